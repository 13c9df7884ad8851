"""BioGPT (Luo et al. 2022, doi:10.1093/bib/bbac409): scaled embeddings, learned positions, a mask of ones."""

from __future__ import annotations

import attrs

from hardware.dtypes import FP32
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_even_heads, read_hidden
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

OFFSET = 2
"""Rows before the first position (`BioGptLearnedPositionalEmbedding`)."""


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a BioGPT config; defaults are those of BioGptConfig in transformers 5.23.0."""
    config.refuse("layerdrop", (0, 0.0), "set it to 0")
    hidden = read_hidden(config, 1024)
    heads, head_dim = read_even_heads(config, hidden, 16)
    dropout = config.rate("attention_probs_dropout_prob", 0.1)
    attention = AttentionSpec(heads, heads, head_dim, bias=True, dropout=dropout)
    feed_forward = FeedForwardSpec(
        config.required_size("intermediate_size", 4096, LARGEST_WIDTH),
        config.activation("hidden_act", "gelu"),
        gated=False,
        bias=True,
        dropout=config.rate("activation_dropout", 0.0),
    )
    layers = [LayerSpec(attention, feed_forward)] * read_depth(config, 24)
    rate = config.rate("hidden_dropout_prob", 0.1)
    spec = read_decoder(config, hidden, layers, vocab=42384, positions=1024, tied=True, residual_dropout=rate)
    return attrs.evolve(spec, embedding_dropout=rate)


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`BioGptForCausalLM` (transformers models/biogpt/modeling_biogpt.py)."""
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "biogpt.embed_tokens")
    with t.call("biogpt") as local:
        embeds = local("inputs_embeds", blocks.scaled_embeddings(t, vocabulary, ids, buffer=False))
        ones = t.regime.attention_mask == "none"
        if ones:
            local("attention_mask", ops.constant(t, "ones.default", embeds, dtype=FP32, shape=(("b",), ("s",))))
        mask = masks.causal_mask(t, embeds, ones=ones)
        if mask is not None:
            local("causal_mask", mask)
        position_ids = local("position_ids", masks.positions(t, ids))
        table = t.matrix("embed_positions.weight", (t.dim("P", spec.max_positions + OFFSET),), ("h",))
        with t.call("embed_positions"):
            places = local("positions", ops.embedding(t, table, ops.constant(t, "add.Tensor", position_ids)))
        hidden = local("hidden", ops.add(t, embeds, places))
        hidden = local("hidden", ops.dropout(t, hidden, spec.embedding_dropout))
        for slot, layer in layers:
            with t.layer(slot, hidden, mask, position_ids):
                hidden = local("hidden", _layer(t, hidden, mask, spec, layer))
        hidden = local("hidden", blocks.layer_norm(t, "layer_norm", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary, name="output_projection")
    modules = ("k_proj", "v_proj", "q_proj", "out_proj", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
    t.order_layer_parameters(*modules)


def _layer(t: Trace, x: Tensor, mask: Tensor | None, spec: ModelSpec, layer: LayerSpec) -> Tensor:
    """`BioGptDecoderLayer`."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.layer_norm(t, "self_attn_layer_norm", x))
        hidden, weights = _attention(t, hidden, mask, layer.attention)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        hidden = local("hidden", ops.dropout(t, hidden, spec.residual_dropout))
        residual = local("residual", local("hidden", ops.add(t, x, hidden)))
        hidden = local("hidden", blocks.layer_norm(t, "final_layer_norm", residual))
        width = (t.dim("f", layer.feed_forward.width),)
        hidden = local("hidden", blocks.projection(t, "fc1", hidden, width, bias=True))
        with t.call("activation_fn", hidden):
            hidden = local("hidden", blocks.activation(t, layer.feed_forward.activation, hidden))
        hidden = local("hidden", ops.dropout(t, hidden, layer.feed_forward.dropout))
        hidden = local("hidden", blocks.projection(t, "fc2", hidden, ("h",), bias=True))
        hidden = local("hidden", ops.dropout(t, hidden, spec.residual_dropout))
        return ops.add(t, residual, hidden)


def _attention(t: Trace, x: Tensor, mask: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """`BioGptAttention`: keys and values are both projected before their heads are split."""
    heads, _, d = blocks.head_dims(t, spec)
    split = (*x.shape[:-1], heads, (d,))
    with t.call("self_attn", x) as local:
        query = ops.reshape(t, blocks.projection(t, "q_proj", x, (*heads, d), spec.bias), split)
        query = local("q", ops.transpose(t, query, 1, 2))
        key, value = (
            local(name, blocks.projection(t, f"{name}_proj", x, (*heads, d), spec.bias)) for name in ("k", "v")
        )
        key = local("k", ops.transpose(t, ops.reshape(t, key, split), 1, 2))
        value = local("v", ops.transpose(t, ops.reshape(t, value, split), 1, 2))
        out, weights = blocks.attention(t, query, key, value, mask, spec, blocks.Softmax.PLAIN)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        out = local("out", blocks.projection(t, "out_proj", out, ("h",), spec.bias))
        return out, weights


families.add("biogpt", Family("biogpt", read, forward=forward, config_class="BioGptConfig", bounded_positions=True))
