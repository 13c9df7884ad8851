"""GPT-NeoX and Pythia (Black et al., arXiv:2204.06745): partial rotary positions, attention and MLP side by side."""

from __future__ import annotations

import attrs

from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_even_heads, read_hidden, read_rotary_dim
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a GPT-NeoX config; defaults are those of GPTNeoXConfig in transformers 5.23.0."""
    hidden = read_hidden(config, 6144)
    bias = config.flag("attention_bias", True)
    heads, head_dim = read_even_heads(config, hidden, 64)
    rotated = read_rotary_dim(config, head_dim, 0.25)
    dropout = config.rate("attention_dropout", 0.0)
    attention = AttentionSpec(heads, heads, head_dim, bias=bias, dropout=dropout, rotary_dim=rotated)
    width = config.required_size("intermediate_size", 24576, LARGEST_WIDTH)
    feed_forward = FeedForwardSpec(width, config.activation("hidden_act", "gelu"), gated=False, bias=True)
    spec = read_decoder(config, hidden, [LayerSpec(attention, feed_forward)] * read_depth(config, 44), vocab=50432)
    rate = config.rate("hidden_dropout", 0.0)
    parallel = config.flag("use_parallel_residual", True)
    return attrs.evolve(spec, embedding_dropout=rate, residual_dropout=rate, parallel_blocks=parallel)


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`GPTNeoXForCausalLM` (transformers models/gpt_neox/modeling_gpt_neox.py)."""
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "gpt_neox.embed_in")
    with t.call("gpt_neox") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "embed_in"))
        position_ids = local("position_ids", masks.positions(t, ids))
        mask = masks.causal_mask(t, embeds)
        if mask is not None:
            local("mask", mask)
        with t.call("emb_dropout"):
            hidden = local("hidden", ops.dropout(t, embeds, spec.embedding_dropout))
        tables = blocks.rotary_tables(t, spec.layers[0].attention, embeds)
        for index, table in enumerate(tables):
            local(f"table.{index}", table)
        for slot, layer in layers:
            with t.layer(slot, hidden, mask, *tables, position_ids):
                hidden = local("hidden", _layer(t, hidden, tables, mask, spec, layer))
        hidden = local("hidden", blocks.layer_norm(t, "final_layer_norm", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary)
    t.order_layer_parameters("input_layernorm", "post_attention_layernorm", "attention", "mlp")


def _layer(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, spec: ModelSpec, layer: LayerSpec
) -> Tensor:
    """`GPTNeoXLayer`."""
    with t.call("layer", x) as local:
        attended, weights = _attention(t, blocks.layer_norm(t, "input_layernorm", x), tables, mask, layer.attention)
        local("attn_output", attended)
        if weights is not None:
            local("_", weights)
        with t.call("post_attention_dropout"):
            attended = local("attn_output", ops.dropout(t, attended, spec.residual_dropout))
        if not spec.parallel_blocks:
            attended = local("attn_output", ops.add(t, attended, x))
        mixed = local("mlp_output", _mlp(t, x if spec.parallel_blocks else attended, layer.feed_forward))
        with t.call("post_mlp_dropout"):
            mixed = local("mlp_output", ops.dropout(t, mixed, spec.residual_dropout))
        with t.call("") as inner:
            both = inner("sum", ops.add(t, mixed, attended))
            return ops.add(t, both, x) if spec.parallel_blocks else both


def _mlp(t: Trace, x: Tensor, spec: FeedForwardSpec) -> Tensor:
    normalised = blocks.layer_norm(t, "post_attention_layernorm", x)
    return blocks.plain_mlp(t, normalised, spec, ("mlp", "dense_h_to_4h", "act", "dense_4h_to_h"))


def _attention(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """`GPTNeoXAttention`: queries, keys and values of a head lie side by side."""
    heads, _, d = blocks.head_dims(t, spec)
    with t.call("attention", x) as local:
        fused = blocks.projection(t, "query_key_value", x, (*heads, 3, d), spec.bias)
        fused = local("qkv", ops.transpose(t, ops.reshape(t, fused, (*x.shape[:-1], heads, (3, d))), 1, 2))
        parts = ops.split(t, fused, (*fused.shape[:-1], (d,)), 3)
        query, key, value = (local(name, part) for name, part in zip("qkv", parts, strict=True))
        query, key = blocks.rotate_part(t, query, key, *tables, join_late=True)
        local("q", query)
        local("k", key)
        out, weights = blocks.attention(t, query, key, value, mask, spec)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        return blocks.projection(t, "dense", out, ("h",), spec.bias), weights


_ALIASES = {"rotary_pct": "partial_rotary_factor"}
"""GPTNeoXConfig.convert_rope_params_to_dict."""
families.add("gpt_neox", Family("gpt_neox", read, forward=forward, config_class="GPTNeoXConfig", aliases=_ALIASES))
