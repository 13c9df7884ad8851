"""Nemotron-H (arXiv:2504.03624) and Nemotron 3: one of a state space model, attention, experts, an MLP per layer."""

from __future__ import annotations

from functools import partial

import attrs

from hardware.dtypes import FP32
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import FULL, read_attention, read_decoder, read_hidden
from simulator.families.experts.reading import read_experts, read_groups
from simulator.families.hybrid.reading import LINEAR, read_kinds, read_state_space
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor, flat
from simulator.limits import LARGEST_HIDDEN, LARGEST_WIDTH
from simulator.model import ExpertsSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

_LETTERS = {"M": LINEAR, "E": "moe", "*": FULL, "-": "mlp"}
"""Kinds of layers in ``hybrid_override_pattern`` (configuration_nemotron_h.py)."""
_ALIASES = {
    "layer_types": "layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
}
"""attribute_map of NemotronHConfig, and the names that its ``__post_init__`` takes."""
_PLAIN = ("up_proj", "act_fn", "down_proj")


def read(config: ConfigReader) -> ModelSpec:
    """The spec of such a config; defaults are those of NemotronHConfig in transformers 5.23.0."""
    for key in ("attention_bias", "mamba_proj_bias", "tie_word_embeddings"):
        config.refuse(key, (False, None), "set it to false: the class has none")
    hidden = read_hidden(config, 4096)
    kinds = read_kinds(config, "layers_block_type", "hybrid_override_pattern", _LETTERS)
    readers = {LINEAR: _read_mixer, FULL: _read_attention, "mlp": _read_mlp, "moe": _read_experts}
    config.read.add("n_groups")  # of state space models, not a misspelt n_group of experts, if there are only these
    each = {kind: readers[kind](config, hidden) for kind in dict.fromkeys(kinds)}
    return read_decoder(config, hidden, [each[kind] for kind in kinds], vocab=131072, positions=4096)


def _read_mixer(config: ConfigReader, _: int) -> LayerSpec:
    """A layer with a state space model."""
    mixer = read_state_space(
        config,
        heads=("mamba_num_heads", 128),
        head_dim=("mamba_head_dim", 64),
        state=("ssm_state_size", 128),
        groups=("n_groups", 8),
        kernel=("conv_kernel", 4),
        chunk=("chunk_size", 128),
        conv_bias="use_conv_bias",
        activation="mamba_hidden_act",
    )
    return LayerSpec(attrs.evolve(mixer, bias=config.flag("use_bias", False)), None)


def _read_attention(config: ConfigReader, hidden: int) -> LayerSpec:
    """A layer with attention, without positions."""
    attention = read_attention(config, hidden, heads=32, kv_heads=8, head_dim=128, even=False, null_kv_heads=True)
    return LayerSpec(attrs.evolve(attention, rotary=False), None)


def _read_mlp(config: ConfigReader, _: int) -> LayerSpec:
    """A layer with a plain MLP."""
    width = config.size("intermediate_size", 21504, LARGEST_WIDTH)
    activation = config.activation("mlp_hidden_act", "relu2")
    return LayerSpec(None, FeedForwardSpec(width, activation, gated=False, bias=config.flag("mlp_bias", False)))


def _read_experts(config: ConfigReader, _: int) -> LayerSpec:
    """A layer with experts without a gate, at the hidden size or at a latent one, and a shared MLP."""
    experts = read_experts(
        config,
        width=("moe_intermediate_size", 7688),
        experts=("n_routed_experts", 8),
        per_token=2,
        normalised=True,
        shared_width=config.size("moe_shared_expert_intermediate_size", 7688, LARGEST_WIDTH),
        activation=("mlp_hidden_act", "relu2"),
    )
    latent = config.optional_size("moe_latent_size", None, LARGEST_HIDDEN)
    bias = config.flag("mlp_bias", False)
    return LayerSpec(None, attrs.evolve(read_groups(config, experts), gated=False, bias=bias, latent=latent))


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`NemotronHForCausalLM` (transformers models/nemotron_h/modeling_nemotron_h.py)."""
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "model.embeddings")
    with t.call("model") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "embeddings"))
        position_ids = local("position_ids", masks.positions(t, embeds))
        mask = masks.causal_mask(t, embeds)
        if mask is not None:
            local("mask", mask)
        hidden = local("hidden_states", embeds)
        for slot, layer in layers:
            own = mask if layer.attends else None
            with t.layer(slot, hidden, own, position_ids):
                hidden = local("hidden_states", _block(t, hidden, own, layer))
        hidden = local("hidden_states", _norm(t, "norm_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary, partial(ops.to, dtype=FP32))
    moe = ("experts", "gate", "shared_experts", "fc1_latent_proj", "fc2_latent_proj")
    t.order_layer_parameters(*blocks.STATE_SPACE, *moe, "mixer")


_norm = partial(blocks.llama_rms_norm, weight_in_fp32=True, cast_weight=True)


def _block(t: Trace, x: Tensor, mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`NemotronHBlock`: one mixer, of tokens or of channels."""
    with t.call("layer", x) as local:
        hidden = local("hidden_states", _norm(t, "norm", x))
        if layer.attends:
            with t.call("mixer"):
                hidden, weights = blocks.rotary_attention(t, hidden, (), mask, layer.attention)
            if weights is not None:
                local("_", weights)
        elif layer.token_mixer is not None:
            hidden = blocks.mamba2_mixer(t, hidden, layer.state_space)
        elif isinstance(layer.channel_mixer, ExpertsSpec):
            hidden = _experts(t, hidden, layer.channel_mixer)
        else:
            hidden = blocks.plain_mlp(t, hidden, layer.feed_forward, ("mixer", *_PLAIN))
        return ops.add(t, x, local("hidden_states", hidden))


def _experts(t: Trace, x: Tensor, spec: ExpertsSpec) -> Tensor:
    """`NemotronHMoE`: experts that may work in a latent space, and a shared MLP."""
    with t.call("mixer", x) as local:
        routed = blocks.grouped_sigmoid_router(t, x, spec, correction=FP32)
        for name, tensor in zip(("_", "topk_weights", "topk_indices"), routed, strict=True):
            local(name, tensor)
        out = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        if spec.latent is not None:
            latent = (t.dim("latent", spec.latent),)
            out = local("hidden_states", blocks.projection(t, "fc1_latent_proj", out, latent, spec.bias))
        own = attrs.evolve(spec, bias=False)  # of all linear layers the experts alone have none
        out = local("hidden_states", blocks.routed_experts(t, out, routed[1], routed[2], own))
        if spec.latent is not None:
            out = local("hidden_states", blocks.projection(t, "fc2_latent_proj", out, ("h",), spec.bias))
        out = local("hidden_states", ops.reshape(t, out, x.shape))
        with t.call("") as inner:
            shared = inner("shared", blocks.plain_mlp(t, x, spec.shared, ("shared_experts", *_PLAIN)))
            return ops.add(t, out, shared)


families.add(
    "nemotron_h", Family("nemotron_h", read, forward=forward, config_class="NemotronHConfig", aliases=_ALIASES)
)
