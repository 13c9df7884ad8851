"""gpt-oss (arXiv:2508.10925): attention sinks, biases everywhere, clamped gates, windows in every second layer."""

from __future__ import annotations

from functools import partial

import attrs

from hardware.errors import UnsupportedError
from simulator import blocks, ops
from simulator.decoder import BuiltLayers, full_and_own_windows, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import (
    FULL,
    SLIDING,
    read_attention,
    read_decoder,
    read_depth,
    read_hidden,
    read_windows,
)
from simulator.families.experts.reading import read_experts, with_load_balancing
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.model import ExpertsSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

FORM = blocks.Form(transposed=True, masked=False, gate=blocks.clamped_gate)


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a gpt-oss config; defaults are those of GptOssConfig in transformers 5.23.0."""
    hidden = read_hidden(config, 2880)
    bias = config.flag("attention_bias", True)
    attention = read_attention(config, hidden, heads=64, kv_heads=8, head_dim=64, bias=bias, even=False)
    experts = read_experts(
        config, width=("intermediate_size", 2880), experts=("num_local_experts", 128), per_token=4, balanced=True
    )
    depth = read_depth(config, 36)
    kinds = [FULL if index % 2 else SLIDING for index in range(depth)]
    windows = read_windows(config, depth, window=128, kinds=kinds, rule=f"{SLIDING} and {FULL} in turn")
    experts = attrs.evolve(experts, bias=True)
    layers = [LayerSpec(attrs.evolve(attention, window=each), experts) for each in windows]
    return with_load_balancing(config, read_decoder(config, hidden, layers, vocab=201088, positions=131072))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`GptOssForCausalLM` (transformers models/gpt_oss/modeling_gpt_oss.py)."""
    if t.regime.attention != "eager":
        raise UnsupportedError(f"'attention' of gpt_oss must be eager, not {t.regime.attention}: no other knows sinks")
    norm = partial(blocks.llama_rms_norm, weight_in_fp32=True)
    make_tables = partial(blocks.rotary_tables, doubled=False)
    windows = full_and_own_windows(spec)
    rotary_decoder(t, spec, layers, layer=_layer, norm=norm, windows=windows, make_tables=make_tables)
    attention = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
    experts = ("mlp", "router", "experts", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    t.order_layer_parameters(*attention, *experts, *blocks.BEFORE)


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`GptOssDecoderLayer`: its MLP returns the router's scores, too."""
    norm = partial(blocks.llama_rms_norm, weight_in_fp32=True)
    with t.call("layer", x) as local:
        hidden = local("hidden", norm(t, "input_layernorm", x))
        hidden, weights = blocks.rotary_attention(
            t, hidden, tables, mask, layer.attention, rotate=blocks.rotate_halves, interface=blocks.attention_with_sinks
        )
        local("hidden", hidden)
        assert weights is not None
        local("_", weights)
        residual = local("residual", local("hidden", ops.add(t, x, hidden)))
        hidden = local("hidden", norm(t, "post_attention_layernorm", residual))
        feed = layer.feed_forward
        assert isinstance(feed, ExpertsSpec)
        hidden, scores = blocks.experts_and_scores(
            t,
            hidden,
            feed,
            router=blocks.top_k_router,
            form=blocks.Form(transposed=True, masked=False, gate=blocks.clamped_gate),
        )
        local("hidden", hidden)
        local("_", scores)
        return ops.add(t, residual, hidden)


families.add(
    "gpt_oss",
    Family(
        "gpt_oss",
        read,
        forward=forward,
        config_class="GptOssConfig",
        aliases={"num_experts": "num_local_experts"},
    ),
)
