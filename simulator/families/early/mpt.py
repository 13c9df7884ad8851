"""MPT (MosaicML 2023): ALiBi biases added in fp32, norms and projections without biases."""

from __future__ import annotations

import attrs

from hardware.dtypes import BOOL, FP32, INT32, INT64
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_even_heads
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HIDDEN, LARGEST_LAYERS, LARGEST_POSITIONS
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Frame, Trace

_ALIASES = {"num_attention_heads": "n_heads", "hidden_size": "d_model", "num_hidden_layers": "n_layers"}
"""attribute_map of MptConfig."""


def read(config: ConfigReader) -> ModelSpec:
    """The spec of an MPT config; defaults are those of MptConfig in transformers 5.23.0."""
    config.refuse("expansion_ratio", (4,), "set it to 4, which transformers' MPT always takes")
    config.refuse("no_bias", (True,), "set it to true: transformers' MPT has no biases")
    hidden = config.required_size("d_model", 2048, LARGEST_HIDDEN)
    heads, head_dim = read_even_heads(config, hidden, 16, key="n_heads", of="d_model")
    attention = AttentionSpec(heads, heads, head_dim, clipped=_read_clipping(config))
    layer = LayerSpec(attention, FeedForwardSpec(4 * hidden, "gelu", gated=False))
    layers = [layer] * config.required_size("n_layers", 24, LARGEST_LAYERS)
    spec = read_decoder(config, hidden, layers, vocab=50368, positions=None, tied=True)
    return attrs.evolve(spec, max_positions=config.size("max_seq_len", 2048, LARGEST_POSITIONS))


def _read_clipping(config: ConfigReader) -> bool:
    """Whether ``attn_config`` clips queries, keys and values; what transformers' MPT ignores is refused."""
    if not config.given("attn_config"):
        return False
    inner = config.section("attn_config", "MptAttentionConfig")
    for key, only in (("attn_type", "multihead_attention"), ("alibi", True), ("qk_ln", False), ("prefix_lm", False)):
        inner.refuse(key, (only,), f"set it to {only}, which transformers' MPT always takes")
    inner.refuse("attn_pdrop", (0, 0.0), "set it to 0: MptAttentionConfig takes whole numbers only")
    return inner.softcap("clip_qkv", None) is not None


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`MptForCausalLM` (transformers models/mpt/modeling_mpt.py)."""
    decoder.only_eager(t, spec)
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "transformer.wte")
    with t.call("transformer") as local:
        hidden = local("hidden", local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "wte")))
        alibi = local("alibi", _alibi(t, hidden, spec))
        with t.call("") as inner:
            mask = masks.causal_mask(t, hidden)
            assert mask is not None
            mask = local("causal_mask", ops.constant(t, "_to_copy.default", inner("mask", mask), dtype=BOOL))
        for slot, layer in layers:
            with t.layer(slot, hidden, alibi, mask):
                hidden, weights = _block(t, hidden, alibi, mask, layer)
                local("outputs", weights)  # the tuple that a block returned lives until the next one returns
                local("hidden", hidden)
        hidden = local("hidden", blocks.layer_norm(t, "norm_f", hidden, bias=False))
    decoder.language_head(t, hidden, labels, spec, vocabulary)


def _alibi(t: Trace, like: Tensor, spec: ModelSpec) -> Tensor:
    """`build_mpt_alibi_tensor`: biases ``[a, 1, positions]`` of the distance to the end (arXiv:2108.12409)."""
    heads, _, _ = blocks.head_dims(t, spec.layers[0].attention)
    positions = (t.dim("P", spec.max_positions),)
    with t.call("") as local:
        local("alibi", ops.constant(t, "arange.start", like, dtype=INT32, shape=(positions,)))
        _slopes(t, like, spec.layers[0].attention.heads, local)
        return ops.constant(t, "mul.Tensor", like, dtype=FP32, shape=(heads, (), positions))


def _slopes(t: Trace, like: Tensor, heads: int, local: Frame) -> None:
    """One per head, picked from those of the next power of two."""
    power = 1 << (heads - 1).bit_length()
    shape = ((t.dim("a_power", power),),)
    with t.call("") as inner:
        inner("arange", ops.constant(t, "arange.start", like, dtype=INT64, shape=shape))
        local("base", ops.constant(t, "_to_copy.default", like, dtype=FP32, shape=shape))
    local("base", ops.constant(t, "mul.Tensor", like, dtype=FP32, shape=shape))
    with t.call("") as inner:
        inner("power", ops.constant(t, "pow.Scalar", like, dtype=FP32, shape=shape))
        inner("reciprocal", ops.constant(t, "reciprocal.default", like, dtype=FP32, shape=shape))
        local("slopes", ops.constant(t, "mul.Tensor", like, dtype=FP32, shape=shape))
    if power != heads:
        local("slopes", ops.constant(t, "cat.default", like, dtype=FP32, shape=shape))


def _block(t: Trace, x: Tensor, alibi: Tensor, mask: Tensor, layer: LayerSpec) -> tuple[Tensor, Tensor]:
    """`MptBlock`: returns the attention weights, too."""
    with t.call("layer", x) as local:
        normalised = local("layernorm_output", blocks.layer_norm(t, "norm_1", x, bias=False))
        attended, weights = _attention(t, normalised, alibi, mask, layer.attention)
        local("attn_outputs", attended)
        local("attn_weights", weights)
        hidden = local("hidden", ops.add(t, attended, x))
        normalised = local("layernorm_output", blocks.layer_norm(t, "norm_2", hidden, bias=False))
        return _mlp(t, normalised, hidden, layer.feed_forward), weights


def _mlp(t: Trace, x: Tensor, residual: Tensor, spec: FeedForwardSpec) -> Tensor:
    """`MptMLP`."""
    with t.call("ffn", x, residual) as local:
        with t.call("") as inner:
            up = inner("up", blocks.projection(t, "up_proj", x, (t.dim("f", spec.width),), spec.bias))
            with t.call("act", up):
                hidden = local("hidden", blocks.activation(t, spec.activation, up))
        out = local("intermediate_output", blocks.projection(t, "down_proj", hidden, ("h",), spec.bias))
        return ops.add(t, out, residual)


def _attention(t: Trace, x: Tensor, alibi: Tensor, mask: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """`MptAttention`: the bias, which is fp32, is added, and what the mask hides is filled."""
    heads, _, d = blocks.head_dims(t, spec)
    with t.call("attn", x) as local:
        fused = local("mixed_qkv", blocks.projection(t, "Wqkv", x, (3, *heads, d), spec.bias))
        if spec.clipped:
            fused = local("mixed_qkv", ops.clamp(t, fused))
        parts = ops.split(t, fused, (*x.shape[:-1], (*heads, d)), 3)
        query, key, value = (
            local(name, ops.transpose(t, ops.reshape(t, part, (*x.shape[:-1], heads, (d,))), 1, 2))
            for name, part in zip("qkv", parts, strict=True)
        )
        scores = local("scores", ops.mul_scalar(t, ops.matmul(t, query, ops.transpose(t, key, 2, 3))))
        bias = ops.narrow(t, alibi, (heads, (), x.shape[1]))
        scores = local("scores", ops.add(t, scores, bias))
        scores = local("scores", ops.masked_fill(t, scores, mask))
        with t.call("") as inner:
            probabilities = inner("softmax", ops.softmax(t, inner("float", ops.to(t, scores, FP32))))
            weights = local("weights", ops.to(t, probabilities, value.dtype))
        context = local("context", ops.matmul(t, weights, value))
        context = local("context", blocks.merge_heads(t, context))
        return local("output", blocks.projection(t, "out_proj", context, ("h",), spec.bias)), weights


families.add(
    "mpt",
    Family("mpt", read, forward=forward, config_class="MptConfig", aliases=_ALIASES, bounded_positions=True),
)
