"""Falcon's attention: keys and values of few heads by broadcasting, or by copies for every query head."""

from __future__ import annotations

import attrs

from simulator import blocks, ops
from simulator.graph import Tensor
from simulator.model import AttentionSpec
from simulator.sizes import Dim
from simulator.trace import Trace


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
        states = _states(t, x, heads, d, spec)
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


def _states(t: Trace, x: Tensor, heads: tuple[Dim, ...], d: str, spec: AttentionSpec) -> list[Tensor]:
    """`_split_heads`: queries, keys and values ``[b, s, heads, d]``."""
    if isinstance(spec, GroupedAttentionSpec):
        return _grouped_keys(t, x, heads, d, spec)
    return _one_key(t, x, heads, d, spec) if spec.kv_heads < spec.heads else _key_per_head(t, x, heads, d, spec)


def _grouped_keys(t: Trace, x: Tensor, heads: tuple[Dim, ...], d: str, spec: AttentionSpec) -> list[Tensor]:
    """``new_decoder_architecture``: keys and values are copied for every query head, queries are made contiguous."""
    rows, key_heads = x.shape[:-1], (heads[0],)
    group = (t.dim("g", spec.groups),)
    joint = t.dim("g+2", spec.groups + 2)
    with t.call("") as local:
        fused = local("fused_qkv", linear(t, "query_key_value", x, (*key_heads, joint, d), spec.bias))
        by_head = local("qkv", ops.view(t, fused, (*rows, key_heads, (joint,), (d,))))
        parts = [local("query", ops.narrow(t, by_head, (*rows, key_heads, group, (d,)), axis=-2))]
        parts += [local(name, ops.take_row(t, by_head, (*rows, key_heads, (), (d,)))) for name in ("key", "value")]
        flat = (*rows, (*key_heads, *group), (d,))
        copies = [local("flat_query", ops.view(t, ops.clone(t, parts[0]), flat))]
        for name, part in zip(("flat_key", "flat_value"), parts[1:], strict=True):
            copies.append(local(name, ops.view(t, ops.clone(t, part, parts[0].shape), flat)))
        return copies


def _one_key(t: Trace, x: Tensor, heads: tuple[Dim, ...], d: str, spec: AttentionSpec) -> list[Tensor]:
    """`_split_heads` with ``multi_query``: a slice of queries, copies of the one key and value."""
    rows = x.shape[:-1]
    joint = t.dim("a+2", spec.heads + 2)
    fused = linear(t, "query_key_value", x, (joint, d), spec.bias)
    by_head = ops.view(t, fused, (*rows, (joint,), (d,)))
    query = ops.narrow(t, by_head, (*rows, heads, (d,)), axis=-2)
    return [query, *(ops.take_row(t, by_head, (*rows, (), (d,))) for _ in range(2))]


def _key_per_head(t: Trace, x: Tensor, heads: tuple[Dim, ...], d: str, spec: AttentionSpec) -> list[Tensor]:
    """`_split_heads` without ``multi_query``."""
    fused = linear(t, "query_key_value", x, (*heads, 3, d), spec.bias)
    whole = ops.view(t, fused, (*x.shape[:-1], heads, (3,), (d,)))
    return [ops.select(t, whole, (*x.shape[:-1], heads, (d,))) for _ in range(3)]


def _eager(t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores are scaled in place; the softmax stays in the dtype of the hidden states."""
    with t.call("") as local:
        scores = local("scores", ops.matmul(t, query, ops.transpose(t, key, 2, 3)))
        scores = local("scores", ops.div_into(t, scores))
        with t.call("") as inner:
            masked = inner("masked", ops.add(t, scores, mask))
            scores = local("scores", ops.softmax(t, masked))
        return ops.matmul(t, scores, value), scores
