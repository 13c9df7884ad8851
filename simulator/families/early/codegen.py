"""CodeGen (Nijkamp et al., arXiv:2203.13474): layers of GPT-J, positions turned in fp32, a head with a bias."""

from __future__ import annotations

import attrs

from hardware.dtypes import FP32
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_even_heads
from simulator.families.early.gpt import ALIASES
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HIDDEN, LARGEST_LAYERS, LARGEST_POSITIONS, LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.sizes import Dim
from simulator.trace import Frame, Trace

SHARDS = 4
"""Parts of the fused projection, each with queries, values and keys of its own heads (``mp_num``)."""


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a CodeGen config; defaults are those of CodeGenConfig in transformers 5.23.0."""
    hidden = config.required_size("n_embd", 4096, LARGEST_HIDDEN)
    heads, head_dim = read_even_heads(config, hidden, 16, key="n_head", of="n_embd")
    config.check(heads % SHARDS == 0, f"n_head must be a multiple of {SHARDS}, not {heads}", "n_head")
    rotated = config.size("rotary_dim", 64, LARGEST_HIDDEN)
    rule = f"rotary_dim must be even and at most n_embd / n_head = {head_dim}, not {rotated}"
    fits = rotated % 2 == 0 and rotated <= head_dim
    config.check(fits, rule, "rotary_dim", "n_embd", "n_head")
    width = config.derived_size("n_inner", 4 * hidden, "4 * n_embd", LARGEST_WIDTH)
    feed_forward = FeedForwardSpec(width, config.activation("activation_function", "gelu_new"), gated=False, bias=True)
    attention = AttentionSpec(
        heads, heads, head_dim, dropout=config.rate("attn_pdrop", 0.0), rotary_dim=rotated if fits else None
    )
    layers = [LayerSpec(attention, feed_forward)] * config.required_size("n_layer", 28, LARGEST_LAYERS)
    rate = config.rate("resid_pdrop", 0.0)
    spec = read_decoder(config, hidden, layers, vocab=50400, positions=None, residual_dropout=rate)
    positions = config.size("n_positions", 2048, LARGEST_POSITIONS)
    return attrs.evolve(spec, embedding_dropout=config.rate("embd_pdrop", 0.0), max_positions=positions)


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`CodeGenForCausalLM` (transformers models/codegen/modeling_codegen.py)."""
    decoder.only_eager(t, spec)
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "transformer.wte")
    with t.call("transformer") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "wte"))
        position_ids = local("position_ids", masks.positions(t, ids))
        mask = masks.causal_mask(t, embeds)
        assert mask is not None
        local("causal_mask", mask)
        with t.call("drop"):
            hidden = local("hidden", ops.dropout(t, embeds, spec.embedding_dropout))
        for slot, layer in layers:
            with t.layer(slot, hidden, mask, position_ids):
                hidden, weights = _block(t, hidden, mask, position_ids, spec, layer)
                local("outputs", weights)  # the tuple that a block returned lives until the next one returns
                local("hidden", hidden)
        hidden = local("hidden", blocks.layer_norm(t, "ln_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary, bias=True)


def _block(
    t: Trace, x: Tensor, mask: Tensor, position_ids: Tensor, spec: ModelSpec, layer: LayerSpec
) -> tuple[Tensor, Tensor]:
    """`CodeGenBlock`: attention and MLP read the same norm; returns the attention weights, too."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.layer_norm(t, "ln_1", x))
        attended, weights = _attention(t, hidden, mask, position_ids, spec, layer.attention)
        local("attn_outputs", attended)
        local("attn_weights", weights)
        names = ("mlp", "fc_in", "act", "fc_out")
        mixed = blocks.plain_mlp(t, hidden, layer.feed_forward, names, spec.residual_dropout)
        local("feed_forward", mixed)
        with t.call("") as inner:
            return ops.add(t, inner("sum", ops.add(t, attended, mixed)), x), weights


def _attention(
    t: Trace, x: Tensor, mask: Tensor, position_ids: Tensor, spec: ModelSpec, layer: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """`CodeGenAttention`: each layer has sines and cosines of every position."""
    with t.call("attn", x) as local:
        rotated = t.dim("d" if layer.rotated == layer.head_dim else "d_rotated", layer.rotated)
        table = t.buffer("embed_positions", t.dim("P", spec.max_positions), rotated, dtype=FP32)
        query, key, value = _states(t, x, layer, local)
        turns = ops.constant(t, "index.Tensor", table, shape=(*position_ids.shape, (rotated,)))
        query, key = _rotate(t, query, key, local("sincos", turns), local)
        query, key = (local(n, ops.transpose(t, each, 1, 2)) for n, each in (("query", query), ("key", key)))
        out, weights = _attend(t, query, key, value, mask, layer.dropout)
        local("weights", weights)
        local("out", out)
        out = local("out", blocks.merge_heads(t, out))
        out = local("out", blocks.projection(t, "out_proj", out, ("h",), layer.bias))
        with t.call("resid_dropout"):
            return ops.dropout(t, out, spec.residual_dropout), weights


def _states(t: Trace, x: Tensor, spec: AttentionSpec, local: Frame) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys ``[b, s, a, d]``, values ``[b, a, s, d]``: copies where a part has several heads."""
    d, own = t.dim("d", spec.head_dim), t.dim("a/4", spec.heads // SHARDS)
    rows, heads = x.shape[:-1], (SHARDS, own)
    fused = local("qkv", blocks.projection(t, "qkv_proj", x, (SHARDS, 3, own, d), spec.bias))
    by_part = ops.reshape(t, fused, (*rows, (SHARDS,), (3, own, d)))
    parts = ops.split(t, by_part, (*rows, (SHARDS,), (own, d)), 3)
    states = {}
    for name, part in zip(("query", "value", "key"), parts, strict=True):
        local(name, part)
    for name, part in (("query", parts[0]), ("key", parts[2]), ("value", parts[1])):
        states[name] = local(name, _split_heads(t, part, (*rows, heads, (d,)), spec))
    return states["query"], states["key"], local("value", ops.transpose(t, states["value"], 1, 2))


def _split_heads(t: Trace, part: Tensor, shape: tuple[tuple[Dim, ...], ...], spec: AttentionSpec) -> Tensor:
    """`_split_heads`: heads of all parts in one axis."""
    if spec.heads == SHARDS:
        return ops.view(t, part, shape)
    return ops.view(t, ops.clone(t, part), shape, "_unsafe_view.default")


def _rotate(t: Trace, query: Tensor, key: Tensor, turns: Tensor, local: Frame) -> tuple[Tensor, Tensor]:
    """Leading channels turned in pairs, the rest put behind them; all in fp32, which the tables are."""
    half = (*turns.shape[:-1], blocks.half(t, turns.shape[-1]))
    sin, cos = (local(n, part) for n, part in zip(("sin", "cos"), ops.split(t, turns, half, 2), strict=True))
    cut = {}
    for name, x in (("k", key), ("q", query)):
        first, rest = blocks.cut_rotated(t, x, turns.shape[-1])
        cut[name] = local(f"{name}_rot", first), local(f"{name}_pass", rest)
    turned = {name: local(f"{name}_rot", _turn(t, first, sin, cos)) for name, (first, _) in cut.items()}
    key, query = (
        local(name, blocks.join_rotated(t, turned[name[0]], cut[name[0]][1], query)) for name in ("key", "query")
    )
    return query, key


def _turn(t: Trace, x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """`apply_rotary_pos_emb`: every second channel changes places with the one before it."""
    with t.call("", x, sin, cos) as local:
        sin, cos = (local(n, _twice(t, table, x.shape[-1])) for n, table in (("sin", sin), ("cos", cos)))
        direct = ops.mul(t, x, cos)
        with t.call("", x) as inner:
            parts = ops.slices(t, x, (*x.shape[:-1], blocks.half(t, x.shape[-1])), 2)
            first, second = (inner(n, part) for n, part in zip(("x1", "x2"), parts, strict=True))
            swapped = ops.pairs(t, ops.neg(t, second), first, x.shape)
        return ops.add(t, direct, ops.mul(t, swapped, sin))


def _twice(t: Trace, table: Tensor, channels: tuple[Dim, ...]) -> Tensor:
    """``repeat_interleave`` of each angle for both channels of its pair."""
    return ops.constant(t, "clone.default", table, shape=(*table.shape[:-1], (), channels))


def _attend(t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """`CodeGenAttention._attn`: scores are divided when the mask has been added."""
    with t.call("", query, key, value) as local:
        query, key = (local(name, ops.to(t, x, FP32)) for name, x in (("query", query), ("key", key)))
        weights = local("weights", ops.matmul(t, query, ops.transpose(t, key, 2, 3)))
        weights = local("weights", ops.add(t, weights, mask))
        weights = local("weights", ops.div_scalar(t, weights))
        weights = local("weights", ops.softmax(t, weights))
        weights = local("weights", ops.to(t, weights, value.dtype))
        with t.call("attn_dropout"):
            weights = local("weights", ops.dropout(t, weights, rate))
        return ops.matmul(t, weights, value), weights


families.add(
    "codegen",
    Family("codegen", read, forward=forward, config_class="CodeGenConfig", aliases=ALIASES, bounded_positions=True),
)
