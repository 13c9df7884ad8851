"""GLM-4.5 (arXiv:2508.06471): sigmoid routing in groups, a shared MLP, dense layers first, partly rotated heads."""

from __future__ import annotations

from functools import partial

import attrs

from hardware.dtypes import FP32
from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import (
    read_attention,
    read_decoder,
    read_depth,
    read_gated,
    read_hidden,
    read_rotary_dim,
)
from simulator.families.experts.reading import read_groups, read_routed
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_LAYERS
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a GLM-4.5 config; defaults are those of Glm4MoeConfig in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_attention(
        config,
        hidden,
        heads=96,
        kv_heads=8,
        bias=config.flag("attention_bias", False),
        even=not config.given("head_dim"),
    )
    share = read_rotary_dim(config, attention.head_dim, 0.5)
    normed = config.flag("use_qk_norm", False)
    attention = attrs.evolve(attention, output_bias=False, rotary_dim=share, query_norm=normed)
    experts = read_routed(config, width=1408, experts=128, per_token=8, shared=1, normalised=True)
    experts = read_groups(config, experts)
    dense = read_gated(config, width=10944)
    depth = read_depth(config, 46)
    first = min(depth, config.count("first_k_dense_replace", 1, LARGEST_LAYERS))
    layers = [LayerSpec(attention, dense)] * first + [LayerSpec(attention, experts)] * (depth - first)
    return read_decoder(config, hidden, layers, vocab=151552, positions=131072)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Glm4MoeForCausalLM` (transformers models/glm4_moe/modeling_glm4_moe.py)."""
    norm = blocks.llama_rms_norm
    normed = partial(blocks.separate_states, norm=norm, normed="transposed")
    states = normed if spec.layers[0].attention.query_norm else blocks.separate_states
    block = partial(blocks.experts_and_shared_mlp, router=partial(blocks.grouped_sigmoid_router, correction=FP32))
    layer = partial(
        blocks.decoder_layer,
        norm=norm,
        attend=partial(blocks.rotary_attention, states=states, rotate=partial(blocks.rotate_part, join_late=True)),
        feed=partial(blocks.experts_or_gated_mlp, block=block),
    )
    rotary_decoder(t, spec, layers, layer=layer, norm=norm)
    attention = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    t.order_layer_parameters(*attention, "mlp", "experts", "gate", "shared_experts", *blocks.BEFORE)


families.add(
    "glm4_moe",
    Family(
        "glm4_moe",
        read,
        forward=forward,
        config_class="Glm4MoeConfig",
        aliases={"num_local_experts": "n_routed_experts"},
    ),
)
