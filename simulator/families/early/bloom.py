"""BLOOM (Le Scao et al., arXiv:2211.05100): ALiBi biases, scores by `baddbmm`, a GELU that saves its input only."""

from __future__ import annotations

from hardware.dtypes import FP32, INT32, INT64
from hardware.errors import UnsupportedError
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_even_heads, read_hidden
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_LAYERS
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

_ALIASES = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "n_embed": "hidden_size"}
"""attribute_map of BloomConfig, and the old name of the hidden size."""


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a BLOOM config; defaults are those of BloomConfig in transformers 5.23.0."""
    config.refuse("slow_but_exact", (False, None), "set it to false")
    config.refuse("apply_residual_connection_post_layernorm", (False, None), "set it to false")
    hidden = read_hidden(config, 64)
    heads, head_dim = read_even_heads(config, hidden, 8, key="n_head")
    rate = config.rate("attention_dropout", 0.0)
    attention = AttentionSpec(heads, heads, head_dim, bias=True, dropout=rate)
    layer = LayerSpec(attention, FeedForwardSpec(4 * hidden, "gelu_pytorch_tanh", gated=False, bias=True))
    layers = [layer] * config.required_size("n_layer", 2, LARGEST_LAYERS)
    dropout = config.rate("hidden_dropout", 0.0)
    return read_decoder(config, hidden, layers, vocab=250880, positions=None, tied=True, residual_dropout=dropout)


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`BloomForCausalLM` (transformers models/bloom/modeling_bloom.py)."""
    if t.regime.attention != "eager":
        raise UnsupportedError(f"'attention' must be eager with bloom, which has no other, not {t.regime.attention!r}")
    if len({layer.attention.heads for layer in spec.layers}) > 1:
        raise UnsupportedError("'heads' must be as many in every layer of bloom: all layers share the biases of heads")
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "transformer.word_embeddings")
    with t.call("transformer") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "word_embeddings"))
        hidden = local("hidden", blocks.layer_norm(t, "word_embeddings_layernorm", embeds))
        alibi = local("alibi", _alibi(t, hidden, spec.layers[0].attention))
        mask = masks.causal_mask(t, embeds)
        assert mask is not None
        local("mask", mask)
        for slot, layer in layers:
            with t.layer(slot, hidden, alibi, mask):
                hidden, weights = _block(t, hidden, alibi, mask, spec, layer)
                local("outputs", weights)  # the tuple that a block returned lives until the next one returns
                local("hidden", hidden)
        hidden = local("hidden", blocks.layer_norm(t, "ln_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary)
    t.order_layer_parameters("input_layernorm", "self_attention", "post_attention_layernorm", "mlp")


def _slopes(t: Trace, like: Tensor, heads: int) -> Tensor:
    """`_get_alibi_slopes`: one per head; a second sequence fills up where heads are no power of two."""
    power = 1 << (heads.bit_length() - 1)
    with t.call("") as local:
        local("base", ops.constant(t, "full.default", like, dtype=FP32, shape=()))
        first = ((t.dim("a_power", power),),)
        local("powers", ops.constant(t, "arange.default", like, dtype=INT32, shape=first))
        slopes = local("slopes", ops.constant(t, "pow.Tensor_Tensor", like, dtype=FP32, shape=first))
        if power == heads:
            return slopes
        rest = ((t.dim("a_rest", heads - power),),)
        local("extra_base", ops.constant(t, "full.default", like, dtype=FP32, shape=()))
        local("extra_powers", ops.constant(t, "arange.default", like, dtype=INT32, shape=rest))
        with t.call("") as inner:
            inner("extra", ops.constant(t, "pow.Tensor_Tensor", like, dtype=FP32, shape=rest))
            return ops.constant(t, "cat.default", like, dtype=FP32, shape=((t.dim("a", heads),),))


def _alibi(t: Trace, like: Tensor, spec: AttentionSpec) -> Tensor:
    """Biases ``[b * a, 1, s]`` of the distance to each key (Press et al., arXiv:2108.12409)."""
    heads, _, _ = blocks.head_dims(t, spec)
    rows = (("b", *heads), ("s",))
    with t.call("") as local:
        local("slopes", _slopes(t, like, spec.heads))
        if t.regime.attention_mask == "none":
            with t.call("") as inner:
                inner("arange", ops.constant(t, "arange.default", like, dtype=INT64, shape=(("s",),)))
                local("alibi", ops.constant(t, "mul.Tensor", like, dtype=FP32, shape=(heads, ("s",))))
            return ops.to(t, ops.constant(t, "repeat.default", like, dtype=FP32, shape=rows), like.dtype)
        with t.call("") as inner:
            given = t.graph.inputs[-1]
            inner("cumsum", ops.constant(t, "cumsum.default", given))
            inner("sub", ops.constant(t, "sub.Tensor", given))
            local("arange_tensor", ops.constant(t, "mul.Tensor", given))
        return ops.to(t, ops.constant(t, "mul.Tensor", like, dtype=FP32, shape=rows), like.dtype)


def _block(
    t: Trace, x: Tensor, alibi: Tensor, mask: Tensor, spec: ModelSpec, layer: LayerSpec
) -> tuple[Tensor, Tensor]:
    """`BloomBlock`: returns the attention weights, too."""
    with t.call("layer", x) as local:
        normalised = local("layernorm_output", blocks.layer_norm(t, "input_layernorm", x))
        attended, weights = _attention(t, normalised, x, alibi, mask, spec, layer.attention)
        local("attention_output", attended)
        local("attn_weights", weights)
        normalised = local("layernorm_output", blocks.layer_norm(t, "post_attention_layernorm", attended))
        return _mlp(t, normalised, attended, spec, layer.feed_forward), weights


def _attention(
    t: Trace, x: Tensor, residual: Tensor, alibi: Tensor, mask: Tensor, spec: ModelSpec, layer: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """`BloomAttention`: everything but the mask and the softmax in three dimensions."""
    heads, _, d = blocks.head_dims(t, layer)
    flat = (("b", *heads), ("s",))
    with t.call("self_attention", x) as local:
        fused = blocks.projection(t, "query_key_value", x, (*heads, 3, d), bias=True)
        states = _by_head(t, fused, heads, d)
        local("fused", fused)
        query, key, value = (local(name, part) for name, part in zip("qkv", states, strict=True))
        query = local("q", ops.reshape(t, query, (*flat, (d,))))
        key = local("k", ops.transpose(t, ops.reshape(t, key, (*flat, (d,))), 1, 2))
        value = local("v", ops.reshape(t, value, (*flat, (d,))))
        scores = local("attention_scores", ops.baddbmm(t, alibi, query, key))
        weights = local("attn_weights", ops.view(t, scores, (("b",), heads, ("s",), ("s",))))
        weights = local("attn_weights", ops.add(t, weights, mask))
        weights = local("attention_probs", ops.to(t, ops.softmax(t, weights, FP32), query.dtype))
        with t.call("attention_dropout"):
            weights = local("attention_probs", ops.dropout(t, weights, layer.dropout))
        context = local("context", ops.bmm(t, local("reshaped", ops.view(t, weights, (*flat, ("s",)))), value))
        by_head = ops.transpose(t, ops.view(t, context, (("b",), heads, ("s",), (d,))), 1, 2)
        context = local("context", ops.reshape(t, by_head, (*x.shape[:-1], (*heads, d))))
        out = local("output", blocks.projection(t, "dense", context, ("h",), bias=True))
        return blocks.dropout_add(t, out, residual, spec.residual_dropout), weights


def _by_head(t: Trace, fused: Tensor, heads: tuple[str | int, ...], d: str) -> list[Tensor]:
    """`_reshape`: every third row, head by head."""
    whole = ops.view(t, fused, (*fused.shape[:-1], heads, (3,), (d,)))
    return [ops.transpose(t, ops.select(t, whole, -2), 1, 2) for _ in range(3)]


def _mlp(t: Trace, x: Tensor, residual: Tensor, spec: ModelSpec, layer: FeedForwardSpec) -> Tensor:
    """`BloomMLP`."""
    with t.call("mlp", x) as local:
        with t.call("") as inner:
            up = inner("up", blocks.projection(t, "dense_h_to_4h", x, (t.dim("f", layer.width),), bias=True))
            with t.call("gelu_impl"):
                active = local("hidden", ops.recomputed_gelu(t, up))
        out = local("intermediate", blocks.projection(t, "dense_4h_to_h", active, ("h",), bias=True))
        return blocks.dropout_add(t, out, residual, spec.residual_dropout)


families.add("bloom", Family("bloom", read, forward=forward, config_class="BloomConfig", aliases=_ALIASES))
