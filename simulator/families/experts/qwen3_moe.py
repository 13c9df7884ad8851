"""Qwen3 with experts (arXiv:2505.09388): norms on queries and keys, many narrow experts, some layers without."""

from __future__ import annotations

from functools import partial

import attrs

from hardware.errors import UnsupportedError
from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import read_attention, read_decoder, read_depth, read_gated, read_hidden
from simulator.families.experts.reading import read_experts, read_sparse_layers, with_load_balancing
from simulator.families.reader import ConfigReader
from simulator.liger import NormPatch
from simulator.limits import LARGEST_POSITIONS
from simulator.model import ExpertsSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Qwen3-MoE config; defaults are those of Qwen3MoeConfig in transformers 5.23.0."""
    hidden = read_hidden(config, 2048)
    attention = read_attention(
        config, hidden, kv_heads=4, bias=config.flag("attention_bias", False), even=not config.given("head_dim")
    )
    if config.flag("use_sliding_window", False):
        attention = attrs.evolve(attention, window=config.optional_size("sliding_window", 4096, LARGEST_POSITIONS))
    dense = read_gated(config, width=6144)
    experts = read_experts(
        config,
        width=("moe_intermediate_size", 768),
        experts=("num_experts", 128),
        per_token=8,
        normalised=False,
        balanced=True,
    )
    layers = read_sparse_layers(config, read_depth(config, 24), attention, dense, experts)
    return with_load_balancing(config, read_decoder(config, hidden, layers, vocab=151936, positions=32768))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Qwen3MoeForCausalLM` (transformers models/qwen3_moe/modeling_qwen3_moe.py)."""
    if t.regime.liger.swiglu and not all(isinstance(layer.feed_forward, ExpertsSpec) for layer in spec.layers):
        raise UnsupportedError("'liger' swiglu looks for experts in every layer, and some have none: leave it out")
    block = partial(blocks.experts_mlp, router=blocks.softmax_router)
    states = partial(blocks.separate_states, norm=partial(blocks.llama_rms_norm, liger=NormPatch.NONE))
    layer = partial(
        blocks.decoder_layer,
        norm=blocks.llama_rms_norm,
        attend=partial(blocks.rotary_attention, states=states),
        feed=partial(blocks.experts_or_gated_mlp, block=block),
    )
    rotary_decoder(t, spec, layers, layer=layer, norm=blocks.llama_rms_norm)
    attention = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    t.order_layer_parameters(*attention, "mlp", "experts", "gate", "input_layernorm", "post_attention_layernorm")


families.add(
    "qwen3_moe",
    Family(
        "qwen3_moe",
        read,
        forward=forward,
        config_class="Qwen3MoeConfig",
        aliases={"num_local_experts": "num_experts"},
    ),
)
