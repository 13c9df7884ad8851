"""Falcon's attention: keys and values of few heads by broadcasting, or by copies for every query head."""

from __future__ import annotations

import attrs

from simulator import blocks, ops
from simulator.graph import Tensor
from simulator.model import AttentionSpec
from simulator.sizes import Dim
from simulator.trace import Frame, Trace


@attrs.frozen(kw_only=True)
class GroupedAttentionSpec(AttentionSpec):
    """Attention of Falcon-40B, whose fused projection has the queries of a key head beside its key and value."""

    norms: int
    """Norms in front of the layer: one for both halves, or two."""


def linear(t: Trace, name: str, x: Tensor, out: tuple[Dim, ...], bias: bool) -> Tensor:
    """`FalconLinear`: the bias is added by an op of its own."""
    with t.call(name, x) as local:
        product = local("hidden", ops.linear_by_matmul(t, x, t.matrix("weight", out, x.shape[-1]), out))
        return ops.add(t, product, t.vector("bias", out)) if bias else product


def attention(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """`FalconAttention`: keys and values of one head are broadcast by the matrix products."""
    heads, _, d = blocks.head_dims(t, spec) if isinstance(spec, GroupedAttentionSpec) else _flat_heads(t, spec)
    with t.call("self_attention", x) as local:
        states = _states(t, x, heads, d, spec, local)
        query, key, value = (
            local(name, ops.transpose(t, part, 1, 2)) for name, part in zip("qkv", states, strict=True)
        )
        query, key = blocks.rotate(t, query, key, *tables)
        local("q", query)
        local("k", key)
        weights = None
        if t.regime.attention == "eager":
            out, weights = _eager(t, query, key, value, mask)
            local("weights", weights)
        else:
            out = ops.scaled_dot_product_attention(t, query, key, value, mask, 0.0, spec.head_dim, broadcast=True)
        out = local("out", out)
        out = local("out", ops.reshape(t, ops.transpose(t, out, 1, 2), (*x.shape[:-1], (*heads, d))))
        return linear(t, "dense", out, ("h",), spec.bias), weights


def _flat_heads(t: Trace, spec: AttentionSpec) -> tuple[tuple[Dim, ...], tuple[Dim, ...], str]:
    heads = (t.dim("a", spec.heads),)
    return heads, heads, t.dim("d", spec.head_dim)


def _states(t: Trace, x: Tensor, heads: tuple[Dim, ...], d: str, spec: AttentionSpec, local: Frame) -> list[Tensor]:
    """`_split_heads`: queries, keys and values ``[b, s, heads, d]``; `local` holds what they are parts of."""
    if isinstance(spec, GroupedAttentionSpec):
        rows: tuple[Dim, ...] = (heads[0], t.dim("g+2", spec.groups + 2))
        split = _grouped_keys
    elif spec.kv_heads < spec.heads:
        split, rows = _one_key, (t.dim("a+2", spec.heads + 2),)
    else:
        split, rows = _key_per_head, (*heads, 3)
    fused = local("fused_qkv", linear(t, "query_key_value", x, (*rows, d), spec.bias))
    return split(t, fused, heads, d)


def _grouped_keys(t: Trace, fused: Tensor, heads: tuple[Dim, ...], d: str) -> list[Tensor]:
    """``new_decoder_architecture``: queries are made contiguous, keys and values are copied for each of them."""
    rows, key_heads, group = fused.shape[:-1], heads[0], t.dim("g", 1) if len(heads) == 1 else heads[1]
    with t.call("") as local:
        by_head = ops.view(t, fused, (*rows, (key_heads,), (fused.shape[-1][1],), (d,)))
        shape = (*rows, (key_heads,), (group,), (d,))
        query = local("query", ops.narrow(t, by_head, shape, axis=-2))
        one = (*rows, (key_heads,), (), (d,))
        key, value = (local(name, ops.take_row(t, by_head, one)) for name in ("key", "value"))
        copies = [local("flat_query", ops.clone(t, query))]
        copies += [local(f"flat_{index}", ops.clone(t, part, shape)) for index, part in enumerate((key, value))]
        return [ops.view(t, each, (*rows, heads, (d,))) for each in copies]


def _one_key(t: Trace, fused: Tensor, heads: tuple[Dim, ...], d: str) -> list[Tensor]:
    """``multi_query``: a slice of queries, copies of the one key and value."""
    rows = fused.shape[:-1]
    by_head = ops.view(t, fused, (*rows, (fused.shape[-1][0],), (d,)))
    query = ops.narrow(t, by_head, (*rows, heads, (d,)), axis=-2)
    return [query, *(ops.take_row(t, by_head, (*rows, (), (d,))) for _ in range(2))]


def _key_per_head(t: Trace, fused: Tensor, heads: tuple[Dim, ...], d: str) -> list[Tensor]:
    """A query, a key and a value of each head, side by side."""
    whole = ops.view(t, fused, (*fused.shape[:-1], heads, (3,), (d,)))
    return [ops.select(t, whole, -2) for _ in range(3)]


def _eager(t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores are scaled in place; the softmax stays in the dtype of the hidden states."""
    with t.call("") as local:
        scores = local("scores", ops.matmul(t, query, ops.transpose(t, key, 2, 3)))
        scores = local("scores", ops.div_into(t, scores))
        with t.call("") as inner:
            masked = inner("masked", ops.add(t, scores, mask))
            scores = local("scores", ops.softmax(t, masked))
        return ops.matmul(t, scores, value), scores
