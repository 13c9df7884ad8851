"""The language model of Llama 4 (Meta, 2025): all experts see all tokens; attention in chunks, or without positions."""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator import blocks, ops
from simulator.decoder import BuiltLayers, full_and_own_windows, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import FULL, read_attention, read_decoder, read_depth, read_hidden
from simulator.families.experts.reading import read_experts
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_LAYERS, LARGEST_POSITIONS, LARGEST_WIDTH
from simulator.model import ExpertsSpec, FeedForwardSpec, LayerSpec, ModelSpec, TemperedAttentionSpec
from simulator.trace import Trace

CHUNKED = "chunked_attention"


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Llama 4 text config; defaults are those of Llama4TextConfig in transformers 5.23.0."""
    hidden = read_hidden(config, 5120)
    experts = read_experts(config, width=("intermediate_size", 8192), experts=("num_local_experts", 16), per_token=1)
    experts = attrs.evolve(experts, shared_width=experts.width)
    dense = FeedForwardSpec(config.size("intermediate_size_mlp", 16384, LARGEST_WIDTH), experts.activation)
    depth = read_depth(config, 48)
    step = config.size("interleave_moe_layer_step", 1, LARGEST_LAYERS)
    every = list(range(step - 1, depth, step))
    sparse = config.indices("moe_layers", depth) if config.given("moe_layers") else every
    layers = [
        LayerSpec(attention, experts if index in sparse else dense)
        for index, attention in enumerate(_attention(config, hidden, depth))
    ]
    return read_decoder(config, hidden, layers, vocab=202048, positions=4096 * 32)


def _attention(config: ConfigReader, hidden: int, depth: int) -> list[TemperedAttentionSpec]:
    """Attention of each layer: most are rotated and see their chunk alone."""
    bias = config.flag("attention_bias", False)
    plain = read_attention(config, hidden, heads=40, kv_heads=8, head_dim=128, bias=bias, even=False)
    interval = config.size("no_rope_layer_interval", 4, LARGEST_LAYERS)
    every = [(index + 1) % interval != 0 for index in range(depth)]
    rotary = every
    if config.given("no_rope_layers"):
        rotary = config.flags("no_rope_layers", every, "each no_rope_layer_interval-th is 0")
    kinds = [CHUNKED if each else FULL for each in rotary]
    kinds = config.names("layer_types", kinds, (CHUNKED, FULL), "layers with rotary positions see chunks")
    chunk = config.size("attention_chunk_size", 8192, LARGEST_POSITIONS)
    norm, tempered = config.flag("use_qk_norm", True), config.flag("attn_temperature_tuning", True)
    values = attrs.asdict(plain) | {"tempered": tempered}
    return [
        TemperedAttentionSpec(
            **values | {"rotary": rotates, "query_norm": norm and rotates, "window": chunk if kind == CHUNKED else None}
        )
        for rotates, kind in zip(rotary, kinds, strict=True)
    ]


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Llama4ForCausalLM` (transformers models/llama4/modeling_llama4.py)."""
    if t.regime.attention not in ("eager", "sdpa"):
        raise UnsupportedError(f"'attention' of llama4 must be sdpa or eager, not {t.regime.attention}")
    rotary_decoder(
        t,
        spec,
        layers,
        layer=_layer,
        norm=blocks.llama4_norm,
        windows=full_and_own_windows(spec),
        make_tables=blocks.complex_rotary_table,
        chunked=True,
    )
    modules = ("self_attn", *blocks.PROJECTIONS, "feed_forward", "experts", "router", "shared_expert")
    t.order_layer_parameters(*modules, "gate_proj", "up_proj", "down_proj", *blocks.BEFORE)


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`Llama4TextDecoderLayer`."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.llama4_norm(t, "input_layernorm", x))
        states, weights = blocks.tempered_attention(t, hidden, tables[0], mask, layer.attention)
        local("attention_states", states)
        if weights is not None:
            local("_", weights)
        residual = local("residual", local("hidden", ops.add(t, x, states)))
        hidden = local("hidden", blocks.llama4_norm(t, "post_attention_layernorm", residual))
        feed = layer.feed_forward
        if isinstance(feed, ExpertsSpec):
            hidden, logits = blocks.all_experts_mlp(t, hidden, feed)
            local("_", logits)
        else:
            hidden = blocks.gated_mlp(t, hidden, feed, ("feed_forward", "gate_proj", "up_proj", "down_proj"))
        local("hidden", hidden)
        return ops.add(t, residual, ops.reshape(t, hidden, residual.shape))


families.add("llama4_text", Family("llama4_text", read, forward=forward, config_class="Llama4TextConfig"))
