"""Queries, keys and values ``[b, heads, s, d]`` of an attention layer: separate or fused projections, norms on them."""

from __future__ import annotations

from collections.abc import Callable

from simulator import ops
from simulator.blocks.linear import projection
from simulator.graph import Tensor, flat
from simulator.model import AttentionSpec
from simulator.sizes import Dim
from simulator.trace import Frame, Trace

#: Hidden states to queries, keys and values; their names live in the frame of the attention module.
States = Callable[[Trace, Tensor, AttentionSpec, Frame], tuple[Tensor, Tensor, Tensor]]
#: A named norm.
Norm = Callable[[Trace, str, Tensor], Tensor]
#: Order in which modules with norms on queries and keys register their projections.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def head_dims(t: Trace, spec: AttentionSpec) -> tuple[tuple[Dim, ...], tuple[Dim, ...], str]:
    """Names of one rank's query heads' dimensions, of its key heads' and of the head dimension.

    With grouped queries the query heads are key heads times groups, so that a key head is
    the same dimension everywhere.
    """
    dim = t.dim("d", spec.head_dim)
    if spec.groups == 1:
        heads = t.shard((t.dim("a", spec.heads),))
        return heads, heads, dim
    key_heads = t.shard((t.dim("k", spec.kv_heads),))
    return (*key_heads, t.dim("g", spec.groups)), key_heads, dim


def merge_heads(t: Trace, x: Tensor) -> Tensor:
    """`_merge_heads` (models/gptj/modeling_gptj.py): ``[b, heads, s, d]`` to ``[b, s, heads * d]``, a copy."""
    swapped = ops.transpose(t, x, 1, 2)
    return ops.view(t, ops.contiguous(t, swapped), (*swapped.shape[:2], flat(swapped.shape[2:])))


def separate_states(
    t: Trace, x: Tensor, spec: AttentionSpec, local: Frame, *, norm: Norm | None = None, normed: str = "heads"
) -> tuple[Tensor, Tensor, Tensor]:
    """`q_proj`, `k_proj` and `v_proj`, with a norm on queries and keys where there is one.

    Args:
        local: the frame of the attention module.
        norm: of queries and keys.
        normed: what it norms: ``projection``, all heads at once (OLMo 2); ``heads``, each before the axes are
            swapped (Qwen3); ``transposed``, each when all three are made (Gemma 3).
    """
    heads, key_heads, d = head_dims(t, spec)
    made = {}
    for name, own in (("q", heads), ("k", key_heads), ("v", key_heads)):
        one = None if name == "v" else norm
        states = projection(t, f"{name}_proj", x, (*own, d), spec.bias)
        if one is not None and normed == "projection":
            states = one(t, f"{name}_norm", states)
        states = ops.reshape(t, states, (*x.shape[:-1], own, (d,)))
        if one is not None and normed == "heads":
            states = one(t, f"{name}_norm", states)
        made[name] = local(name, ops.transpose(t, states, 1, 2))
    if norm is not None and normed == "transposed":
        for name in ("q", "k"):
            made[name] = local(name, norm(t, f"{name}_norm", made[name]))
    return made["q"], made["k"], made["v"]


def fused_states(t: Trace, x: Tensor, spec: AttentionSpec, local: Frame) -> tuple[Tensor, Tensor, Tensor]:
    """`qkv_proj`, cut by three slices (models/phi3/modeling_phi3.py `Phi3Attention`)."""
    heads, key_heads, d = head_dims(t, spec)
    width = t.dim("qkv", (spec.heads + 2 * spec.kv_heads) * spec.head_dim)
    fused = local("qkv", projection(t, "qkv_proj", x, (width,), spec.bias))
    owners = (("q", heads), ("k", key_heads), ("v", key_heads))
    parts = [(name, own, local(name, ops.narrow(t, fused, (*x.shape[:-1], (*own, d))))) for name, own in owners]
    views = [(name, ops.reshape(t, part, (*x.shape[:-1], own, (d,)))) for name, own, part in parts]
    query, key, value = (local(name, ops.transpose(t, view, 1, 2)) for name, view in views)
    return query, key, value
