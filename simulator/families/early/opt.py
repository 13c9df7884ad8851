"""OPT (Zhang et al., arXiv:2205.01068): learned positions counted from the mask, a plain MLP on flattened tokens."""

from __future__ import annotations

import attrs

from hardware.dtypes import FP32, INT64
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_even_heads, read_hidden
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HIDDEN, LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Frame, Trace

OFFSET = 2
"""Rows before the first position (`OPTLearnedPositionalEmbedding`)."""


def read(config: ConfigReader) -> ModelSpec:
    """The spec of an OPT config; defaults are those of OPTConfig in transformers 5.23.0."""
    config.refuse("layerdrop", (0, 0.0), "set it to 0")
    config.refuse("layer_norm_elementwise_affine", (True,), "set it to true")
    hidden = read_hidden(config, 768)
    bias = config.flag("enable_bias", True)
    heads, head_dim = read_even_heads(config, hidden, 12)
    dropout = config.rate("attention_dropout", 0.0)
    attention = AttentionSpec(heads, heads, head_dim, bias=bias, dropout=dropout)
    width = config.required_size("ffn_dim", 3072, LARGEST_WIDTH)
    activation = config.activation("activation_function", "relu")
    layer = LayerSpec(attention, FeedForwardSpec(width, activation, gated=False, bias=bias))
    spec = read_decoder(config, hidden, [layer] * read_depth(config, 12), vocab=50272, tied=True)
    norm_first = config.flag("do_layer_norm_before", True)
    return attrs.evolve(
        spec,
        residual_dropout=config.rate("dropout", 0.1),
        embedding_width=config.derived_size("word_embed_proj_dim", hidden, "hidden_size", LARGEST_HIDDEN),
        norm_first=norm_first,
        final_norm=norm_first and not config.flag("_remove_final_layer_norm", False),
    )


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`OPTForCausalLM` (transformers models/opt/modeling_opt.py)."""
    ids, labels = decoder.batch(t)
    projected = spec.embedding_width not in (None, spec.hidden)
    width = (t.dim("w", spec.embedding_width),) if projected else ("h",)
    vocabulary = t.matrix("model.decoder.embed_tokens.weight", ("V",), width)
    table = t.matrix("model.decoder.embed_positions.weight", (t.dim("P", spec.max_positions + OFFSET),), ("h",))
    with t.call("model.decoder") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "embed_tokens"))
        position_ids = _positions(t, embeds, local)
        mask = masks.causal_mask(t, embeds)
        if mask is not None:
            local("mask", mask)
        with t.call("embed_positions"):
            rows = ops.constant(t, "add.Tensor", position_ids)
            places = local("pos_embeds", ops.embedding(t, table, rows))
        if projected:
            embeds = local("inputs_embeds", blocks.projection(t, "project_in", embeds, ("h",), bias=False))
        hidden = local("hidden", ops.add(t, embeds, places))
        for slot, layer in layers:
            with t.layer(slot, hidden, mask, position_ids):
                hidden = local("hidden", _layer(t, hidden, mask, spec, layer))
        if spec.final_norm:
            hidden = local("hidden", blocks.layer_norm(t, "final_layer_norm", hidden))
        if projected:
            hidden = local("hidden", blocks.projection(t, "project_out", hidden, width, bias=False))
    decoder.language_head(t, hidden, labels, spec, vocabulary)
    modules = ("k_proj", "v_proj", "q_proj", "out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
    t.order_layer_parameters(*modules)


def _positions(t: Trace, like: Tensor, local: Frame) -> Tensor:
    """Numbers of the tokens that the mask keeps, ``[b, s]``: in fp32 where the mask is made here."""
    rows = (("b",), ("s",))
    given = t.regime.attention_mask != "none"
    mask = t.graph.inputs[-1] if given else ops.constant(t, "ones.default", like, dtype=FP32, shape=rows)
    if not given:
        local("position_attention_mask", mask)
    counted = local("position_ids", ops.constant(t, "cumsum.default", mask))
    with t.call("") as inner:
        inner("product", ops.constant(t, "mul.Tensor", counted))
        shifted = inner("shifted", ops.constant(t, "sub.Tensor", counted))
        return local("position_ids", ops.to(t, shifted, INT64))


def _layer(t: Trace, x: Tensor, mask: Tensor | None, spec: ModelSpec, layer: LayerSpec) -> Tensor:
    """`OPTDecoderLayer`: norms before each half, or after it (350m)."""
    with t.call("layer", x) as local:
        hidden = x
        if spec.norm_first:
            hidden = local("hidden", blocks.layer_norm(t, "self_attn_layer_norm", hidden))
        hidden, weights = _attention(t, hidden, mask, layer.attention)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        hidden = local("hidden", ops.dropout(t, hidden, spec.residual_dropout))
        hidden = local("hidden", ops.add(t, x, hidden))
        if not spec.norm_first:
            hidden = local("hidden", blocks.layer_norm(t, "self_attn_layer_norm", hidden))
        residual = local("residual", local("hidden", ops.reshape(t, hidden, (("b", "s"), ("h",)))))
        out = _mlp(t, residual, spec, layer.feed_forward)
        hidden = local("hidden", ops.view(t, ops.add(t, residual, local("hidden", out)), x.shape))
        if spec.norm_first:
            return hidden
        return blocks.layer_norm(t, "final_layer_norm", hidden)


def _mlp(t: Trace, x: Tensor, spec: ModelSpec, layer: FeedForwardSpec) -> Tensor:
    """The second half of the layer, up to the residual."""
    with t.call("") as local:
        hidden = local("hidden", blocks.layer_norm(t, "final_layer_norm", x)) if spec.norm_first else x
        hidden = local("hidden", blocks.projection(t, "fc1", hidden, (t.dim("f", layer.width),), layer.bias))
        with t.call("activation_fn", hidden):
            hidden = local("hidden", blocks.activation(t, layer.activation, hidden))
        hidden = local("hidden", blocks.projection(t, "fc2", hidden, ("h",), layer.bias))
        return ops.dropout(t, hidden, spec.residual_dropout)


def _attention(t: Trace, x: Tensor, mask: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """`OPTAttention`: queries are scaled before the scores."""
    heads, _, d = blocks.head_dims(t, spec)
    split = (*x.shape[:-1], heads, (d,))
    with t.call("self_attn", x) as local:
        query = ops.mul_scalar(t, blocks.projection(t, "q_proj", x, (*heads, d), spec.bias))
        query = local("q", ops.transpose(t, ops.reshape(t, query, split), 1, 2))
        key = local("k", blocks.projection(t, "k_proj", x, (*heads, d), spec.bias))
        value = local("v", blocks.projection(t, "v_proj", x, (*heads, d), spec.bias))
        key = local("k", ops.transpose(t, ops.reshape(t, key, split), 1, 2))
        value = local("v", ops.transpose(t, ops.reshape(t, value, split), 1, 2))
        out, weights = blocks.attention(t, query, key, value, mask, spec)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        return blocks.projection(t, "out_proj", out, ("h",), spec.bias), weights


families.add("opt", Family("opt", read, forward=forward, config_class="OPTConfig", bounded_positions=True))
