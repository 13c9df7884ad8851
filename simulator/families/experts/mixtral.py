"""Mixtral (arXiv:2401.04088): Mistral with eight experts, of which each token visits two."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import read_attention, read_decoder, read_depth, read_hidden
from simulator.families.experts.reading import read_experts, with_load_balancing
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_POSITIONS
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Mixtral config; defaults are those of MixtralConfig in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_attention(config, hidden, kv_heads=8, even=not config.given("head_dim"), null_kv_heads=True)
    if config.given("sliding_window"):
        attention = attrs.evolve(attention, window=config.size("sliding_window", 4096, LARGEST_POSITIONS))
    experts = read_experts(
        config, width=("intermediate_size", 14336), experts=("num_local_experts", 8), per_token=2, balanced=True
    )
    layers = [LayerSpec(attention, experts)] * read_depth(config)
    return with_load_balancing(config, read_decoder(config, hidden, layers, positions=131072))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`MixtralForCausalLM` (transformers models/mixtral/modeling_mixtral.py): weights of experts stay fp32."""
    router = partial(blocks.softmax_router, low_weights=False)
    layer = partial(blocks.decoder_layer, norm=blocks.llama_rms_norm, feed=partial(blocks.experts_mlp, router=router))
    rotary_decoder(t, spec, layers, layer=layer, norm=blocks.llama_rms_norm)
    t.order_layer_parameters("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


families.add(
    "mixtral",
    Family(
        "mixtral",
        read,
        forward=forward,
        config_class="MixtralConfig",
        aliases={"num_experts": "num_local_experts"},
        implementations={"megatron_te": "simulator.implementations.megatron"},
    ),
)
