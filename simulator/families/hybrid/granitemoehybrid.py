"""Granite 4 (IBM, 2025): a state space model or attention, then experts beside a shared MLP, with multipliers."""

from __future__ import annotations

import attrs

from simulator import blocks, ops
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import FULL, read_attention, read_decoder, read_depth, read_hidden
from simulator.families.experts.reading import read_experts, with_load_balancing
from simulator.families.hybrid.reading import LINEAR, OLD_NAMES, read_state_space
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor, flat
from simulator.limits import LARGEST_EXPERTS, LARGEST_HEADS, LARGEST_WIDTH
from simulator.model import ExpertsSpec, FeedForwardSpec, LayerSpec, ModelSpec, StateSpaceSpec
from simulator.trace import Frame, Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of such a config; defaults are those of GraniteMoeHybridConfig in transformers 5.23.0."""
    hidden, depth = read_hidden(config), read_depth(config)
    named = config.names("layer_types", [LINEAR] * depth, (LINEAR, FULL, *OLD_NAMES), f"{LINEAR} everywhere")
    kinds = [OLD_NAMES.get(name, name) for name in named]
    bias = config.flag("attention_bias", False)
    config.refuse("position_embedding_type", (None, "nope", "rope"), "set it to rope or null")
    rotary = config.values.get("position_embedding_type") == "rope"
    attention = attrs.evolve(read_attention(config, hidden, bias=bias, even=False), rotary=rotary)
    rule = f"position_embedding_type 'rope' needs a layer of kind {FULL}: set it to null"
    config.check(not rotary or FULL in kinds, rule, "position_embedding_type", "layer_types")
    mixers = {LINEAR: _read_mixer(config, hidden), FULL: attention}
    channels = _read_channels(config)
    return with_load_balancing(
        config, read_decoder(config, hidden, [LayerSpec(mixers[kind], channels) for kind in kinds])
    )


def _read_mixer(config: ConfigReader, hidden: int) -> StateSpaceSpec:
    inner = hidden * config.size("mamba_expand", 2, LARGEST_HEADS)
    heads = config.size("mamba_n_heads", 128, LARGEST_HEADS)
    mixer = read_state_space(
        config,
        heads=("mamba_n_heads", 128),
        head_dim=("mamba_d_head", max(1, inner // heads)),
        state=("mamba_d_state", 256),
        groups=("mamba_n_groups", 1),
        kernel=("mamba_d_conv", 4),
        chunk=("mamba_chunk_size", 256),
        conv_bias="mamba_conv_bias",
        activation="hidden_act",
        rule="mamba_expand x hidden_size // mamba_n_heads",
    )
    even = f"mamba_expand x hidden_size must be mamba_n_heads x mamba_d_head, not {inner} and {mixer.inner}"
    config.check(inner == mixer.inner, even, "mamba_expand", "hidden_size", "mamba_n_heads", "mamba_d_head")
    return attrs.evolve(mixer, bias=config.flag("mamba_proj_bias", False))


def _read_channels(config: ConfigReader) -> FeedForwardSpec:
    """Experts beside a shared MLP; the shared one alone where there are no experts."""
    width = config.required_size("shared_intermediate_size", 1024, LARGEST_WIDTH)
    if config.count("num_local_experts", 8, LARGEST_EXPERTS) == 0:
        return FeedForwardSpec(width, config.activation("hidden_act", "silu"))
    experts = ("num_local_experts", 8)
    return read_experts(
        config,
        width=("intermediate_size", 11008),
        experts=experts,
        per_token=2,
        normalised=None,
        shared_width=width,
        balanced=True,
    )


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`GraniteMoeHybridForCausalLM` (transformers models/granitemoehybrid/modeling_granitemoehybrid.py)."""
    rotary = any(layer.attends and layer.attention.rotary for layer in spec.layers)
    rotary_decoder(
        t,
        spec,
        layers,
        embed=_embed,
        layer=_layer,
        norm=blocks.llama_rms_norm,
        windows=(None,),
        make_tables=blocks.rotary_tables if rotary else _no_tables,
        scale_logits=ops.div_scalar,
        positions_to_layers=False,
    )
    channels = ("block_sparse_moe", "router", "experts", "shared_mlp")
    t.order_layer_parameters(*blocks.BEFORE, *channels, "self_attn", "mamba", *blocks.STATE_SPACE)


def _embed(t: Trace, vocabulary: Tensor, ids: Tensor) -> Tensor:
    return ops.mul_scalar(t, blocks.token_embeddings(t, vocabulary, ids))


def _no_tables(*_: object, **__: object) -> tuple[Tensor, ...]:
    """What there is of rotary positions where heads are not rotated."""
    return ()


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`GraniteMoeHybridDecoderLayer`."""
    with t.call("layer", x) as local:
        hidden = local("hidden_states", blocks.llama_rms_norm(t, "input_layernorm", x))
        if layer.attends:
            hidden, weights = blocks.rotary_attention(t, hidden, tables, mask, layer.attention)
            if weights is not None:
                local("_", weights)
        else:
            hidden = blocks.mamba2_mixer(t, hidden, layer.state_space, name="mamba")
        branch = ops.mul_scalar(t, local("hidden_states", hidden))
        residual = local("residual", local("hidden_states", ops.add(t, x, branch)))
        hidden = local("hidden_states", blocks.llama_rms_norm(t, "post_attention_layernorm", residual))
        hidden = local("hidden_states", _channels(t, hidden, layer.feed_forward, local))
        return ops.add(t, residual, ops.mul_scalar(t, hidden))


def _channels(t: Trace, x: Tensor, spec: FeedForwardSpec, local: Frame) -> Tensor:
    """The second half of the layer, whose frame is `local`."""
    if not isinstance(spec, ExpertsSpec):
        return _shared_mlp(t, x, spec)
    routed = local("moe_hidden_states", _experts(t, x, spec))
    with t.call("") as inner:
        return ops.add(t, routed, inner("shared", _shared_mlp(t, x, spec.shared)))


def _experts(t: Trace, x: Tensor, spec: ExpertsSpec) -> Tensor:
    """`GraniteMoeHybridMoE`."""
    with t.call("block_sparse_moe", x) as local:
        tokens = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        routed = blocks.chosen_softmax_router(t, tokens, spec)
        t.capture(routed[0])
        for name, tensor in zip(("_", "top_k_weights", "top_k_index"), routed, strict=True):
            local(name, tensor)
        out = local("layer_output", blocks.routed_experts(t, tokens, routed[1], routed[2], spec))
        return ops.view(t, out, x.shape)


def _shared_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec) -> Tensor:
    """`GraniteMoeHybridMLP`: gate and up are halves of one projection."""
    width, both = t.dim("f_shared", spec.width), (t.dim("2f_shared", 2 * spec.width),)
    with t.call("shared_mlp", x) as local:
        fused = local("hidden_states", blocks.projection(t, "input_linear", x, both, bias=False))
        gate, up = ops.split(t, fused, (*x.shape[:-1], (width,)), 2)
        local("chunked_hidden_states", gate)
        active = blocks.activation(t, spec.activation, gate)
        with t.call("", active):
            hidden = local("hidden_states", ops.mul(t, active, up))
        return blocks.projection(t, "output_linear", hidden, ("h",), bias=False)


families.add(
    "granitemoehybrid",
    Family(
        "granitemoehybrid",
        read,
        forward=forward,
        config_class="GraniteMoeHybridConfig",
        aliases={"layers_block_type": "layer_types"},
    ),
)
