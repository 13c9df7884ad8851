"""MiniMax-01 (arXiv:2501.08313): lightning attention, softmax attention in some layers, few experts."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks, ops
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import FULL, read_attention, read_decoder, read_depth, read_hidden
from simulator.families.experts.reading import read_experts, with_load_balancing
from simulator.families.hybrid.reading import LINEAR
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_POSITIONS
from simulator.model import AttentionSpec, LayerSpec, LightningSpec, ModelSpec, TokenMixerSpec
from simulator.trace import Frame, Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of such a config; defaults are those of MiniMaxConfig in transformers 5.23.0."""
    hidden, depth = read_hidden(config), read_depth(config)
    rule = f"{FULL} and {LINEAR} in turn"
    kinds = config.names("layer_types", [(FULL, LINEAR)[index % 2] for index in range(depth)], (FULL, LINEAR), rule)
    config.check(FULL in kinds, f"layer_types must have one {FULL}: without one nothing is rotated", "layer_types")
    experts = read_experts(
        config, width=("intermediate_size", 14336), experts=("num_local_experts", 8), per_token=2, balanced=True
    )
    attention = _read_attention(config, hidden)
    block = config.size("block_size", 256, LARGEST_POSITIONS)
    mixers: dict[str, TokenMixerSpec] = {
        FULL: attention,
        LINEAR: LightningSpec(
            heads=attention.heads, head_dim=attention.head_dim, block=block, activation=experts.activation
        ),
    }
    return with_load_balancing(
        config, read_decoder(config, hidden, [LayerSpec(mixers[kind], experts) for kind in kinds], positions=131072)
    )


def _read_attention(config: ConfigReader, hidden: int) -> AttentionSpec:
    attention = read_attention(config, hidden, kv_heads=8, even=not config.given("head_dim"), null_kv_heads=True)
    if not config.given("sliding_window"):
        return attention
    return attrs.evolve(attention, window=config.size("sliding_window", 4096, LARGEST_POSITIONS))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`MiniMaxForCausalLM` (transformers models/minimax/modeling_minimax.py)."""
    rotary_decoder(t, spec, layers, layer=_layer, norm=blocks.llama_rms_norm)
    inside = ("norm", "qkv_proj", "out_proj", "output_gate")
    t.order_layer_parameters("self_attn", *inside, "input_layernorm", "post_attention_layernorm", "mlp")


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`MiniMaxDecoderLayer`: both halves add to what their norm made, each side times a factor."""
    with t.call("layer", x) as local:
        residual = local("residual", local("hidden_states", blocks.llama_rms_norm(t, "input_layernorm", x)))
        mixed = local("hidden_states", _mix(t, residual, tables, mask, layer.token_mixer, local))
        hidden = local("hidden_states", _weighted_sum(t, residual, mixed))
        hidden = local("hidden_states", blocks.llama_rms_norm(t, "post_attention_layernorm", hidden))
        residual = local("residual", hidden)
        hidden = local("hidden_states", _experts(t, residual, layer.feed_forward))
        return local("hidden_states", _weighted_sum(t, residual, hidden))


_experts = partial(blocks.experts_mlp, router=partial(blocks.softmax_router, low_weights=False))


def _mix(
    t: Trace,
    x: Tensor,
    tables: tuple[Tensor, ...],
    mask: Tensor | None,
    spec: TokenMixerSpec | None,
    local: Frame,
) -> Tensor:
    """Either token mixer of the layer whose frame is `local`."""
    if isinstance(spec, LightningSpec):
        return blocks.lightning_attention(t, x, mask, spec, local)
    assert isinstance(spec, AttentionSpec)
    out, weights = blocks.rotary_attention(t, x, tables, mask, spec)
    if weights is not None:
        local("_", weights)
    return out


def _weighted_sum(t: Trace, residual: Tensor, x: Tensor) -> Tensor:
    """``residual * alpha + x * beta``."""
    return ops.add(t, ops.mul_scalar(t, residual), ops.mul_scalar(t, x))


families.add(
    "minimax",
    Family(
        "minimax",
        read,
        forward=forward,
        config_class="MiniMaxConfig",
        aliases={"num_experts": "num_local_experts"},
    ),
)
