"""GPT-BigCode: StarCoder (Li et al., arXiv:2305.06161) and OctoCoder: GPT-2 with one key/value head for all queries."""

from __future__ import annotations

from hardware.dtypes import BOOL
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.early.gpt import ALIASES, gpt_block, read_gpt
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.model import AttentionSpec, FeedForwardSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a GPT-BigCode config; defaults are those of GPTBigCodeConfig in transformers 5.23.0."""
    return read_gpt(config, activation="gelu_pytorch_tanh", shares_key=config.flag("multi_query", True))


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`GPTBigCodeForCausalLM` (transformers models/gpt_bigcode/modeling_gpt_bigcode.py)."""
    ids, labels = decoder.batch(t)
    vocabulary = t.matrix("transformer.wte.weight", ("V",), ("h",))
    with t.call("transformer") as local:
        positions = t.dim("P", spec.max_positions)
        t.buffer("bias", positions, positions, dtype=BOOL)
        embeds = local("inputs_embeds", t.embedded(ops.embedding(t, vocabulary, ids)))
        position_ids = local("position_ids", masks.positions(t, ids))
        mask = masks.causal_mask(t, embeds)
        if mask is not None:
            local("mask", mask)
        table = t.matrix("wpe.weight", (positions,), ("h",))
        places = local("position_embeds", ops.embedding(t, table, position_ids))
        hidden = local("hidden", ops.add(t, embeds, places))
        with t.call("drop"):
            hidden = local("hidden", ops.dropout(t, hidden, spec.embedding_dropout))
        for slot, layer in layers:
            with t.layer(slot, hidden, mask):
                hidden = local("hidden", gpt_block(t, hidden, mask, spec, layer, _attention, _mlp))
        hidden = local("hidden", blocks.layer_norm(t, "ln_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary)


def _mlp(t: Trace, x: Tensor, spec: ModelSpec, layer: FeedForwardSpec) -> Tensor:
    """`GPTBigCodeMLP`."""
    return blocks.plain_mlp(t, x, layer, ("mlp", "c_fc", "act", "c_proj"), spec.residual_dropout)


def _attention(
    t: Trace, x: Tensor, mask: Tensor | None, spec: ModelSpec, layer: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """`GPTBigCodeAttention`: queries of all heads beside one key and one value, or all three head by head."""
    heads, _, d = blocks.head_dims(t, layer)
    with t.call("attn", x) as local:
        split = _shared_key if layer.kv_heads < layer.heads else _key_per_head
        query, key, value = (local(name, states) for name, states in zip("qkv", split(t, x, layer), strict=True))
        out, weights = blocks.attention(t, query, key, value, mask, layer)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        out = local("out", blocks.projection(t, "c_proj", out, ("h",), bias=True))
        with t.call("resid_dropout"):
            return ops.dropout(t, out, spec.residual_dropout), weights


def _shared_key(t: Trace, x: Tensor, spec: AttentionSpec) -> list[Tensor]:
    heads, _, d = blocks.head_dims(t, spec)
    fused = blocks.projection(t, "c_attn", x, (t.dim("h+2d", (spec.heads + 2) * spec.head_dim),), bias=True)
    rows = x.shape[:-1]
    parts = ops.split_with_sizes(t, fused, [(*rows, (*heads, d)), (*rows, (d,)), (*rows, (d,))])
    query = ops.transpose(t, ops.view(t, parts[0], (*rows, heads, (d,))), 1, 2)
    return [query, *(ops.view(t, part, (rows[0], (), rows[1], (d,))) for part in parts[1:])]


def _key_per_head(t: Trace, x: Tensor, spec: AttentionSpec) -> list[Tensor]:
    heads, _, d = blocks.head_dims(t, spec)
    fused = blocks.projection(t, "c_attn", x, (*heads, 3, d), bias=True)
    by_head = ops.transpose(t, ops.reshape(t, fused, (*x.shape[:-1], heads, (3, d))), 1, 2)
    return list(ops.split_with_sizes(t, by_head, [(*by_head.shape[:-1], (d,))] * 3))


families.add(
    "gpt_bigcode",
    Family(
        "gpt_bigcode", read, forward=forward, config_class="GPTBigCodeConfig", aliases=ALIASES, bounded_positions=True
    ),
)
