"""Qwen1.5 and Qwen2 with experts (arXiv:2407.10671): a gated MLP that every token visits beside the experts."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import read_attention, read_decoder, read_depth, read_gated, read_hidden
from simulator.families.experts.reading import read_experts, read_sparse_layers, with_load_balancing
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_WIDTH
from simulator.model import ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Qwen2-MoE config; defaults are those of Qwen2MoeConfig in transformers 5.23.0."""
    config.refuse("use_sliding_window", (False, None), "set it to false")
    config.refuse("layer_types", (None,), "remove it")
    hidden = read_hidden(config, 2048)
    attention = read_attention(config, hidden, heads=16, kv_heads=16, bias=config.flag("qkv_bias", True))
    experts = read_experts(
        config,
        width=("moe_intermediate_size", 1408),
        experts=("num_experts", 60),
        per_token=4,
        normalised=False,
        shared_width=config.required_size("shared_expert_intermediate_size", 5632, LARGEST_WIDTH),
        balanced=True,
    )
    dense = read_gated(config, width=5632)
    attention = attrs.evolve(attention, output_bias=False)
    layers = read_sparse_layers(config, read_depth(config, 24), attention, dense, experts)
    return with_load_balancing(config, read_decoder(config, hidden, layers, vocab=151936, positions=32768))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Qwen2MoeForCausalLM` (transformers models/qwen2_moe/modeling_qwen2_moe.py)."""
    block = partial(blocks.gated_shared_mlp, router=blocks.softmax_router)
    layer = partial(
        blocks.decoder_layer, norm=blocks.llama_rms_norm, feed=partial(blocks.experts_or_gated_mlp, block=block)
    )
    # without windows the class sets theirs to 0, and makes a mask for such layers though there are none
    rotary_decoder(t, spec, layers, layer=layer, norm=blocks.llama_rms_norm, windows=(None, 0))
    experts = ("mlp", "gate", "experts", "shared_expert", "shared_expert_gate")
    t.order_layer_parameters("self_attn", *experts, "input_layernorm", "post_attention_layernorm")


families.add("qwen2_moe", Family("qwen2_moe", read, forward=forward, config_class="Qwen2MoeConfig"))
