"""Transformer Engine's fused attention, as the parts of a sequence see it (csrc/extensions/attention.cpp)."""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import FP32, UINT64
from simulator.autograd import Autograd
from simulator.frame import Frame
from simulator.graph import Tensor
from simulator.ops.attention import flash_dims, flash_workspace
from simulator.ops.elementwise import constant
from simulator.sizes import Dim
from simulator.trace import Trace

Axis = tuple[Dim, ...]


def half(t: Trace) -> Axis:
    """One of the two chunks of a sequence that a rank has."""
    return (t.dim("s/2", t.dimensions.bindings["s"] // 2),)


def of_tokens(x: Tensor, tokens: Axis) -> tuple[Axis, ...]:
    """The shape of `x` with another number of tokens."""
    return (tokens, *x.shape[1:])


def fused_forward(t: Trace, local: Frame, query: Tensor, tokens: Axis, number: int = 0) -> tuple[Tensor, ...]:
    """`fused_attn_fwd` of `tokens` of `query`: output, fp32 log-sum-exp and 16 B of random state, held by `local`."""
    _, batch, heads, _ = query.shape
    flash_dims(t, query, tokens)
    made = {
        "out": constant(t, "fused_attn_fwd", query, shape=t.squeezed(of_tokens(query, tokens))),
        "rng_state": constant(t, "fused_attn_fwd.rng_state", query, dtype=UINT64, shape=((2,),)),
        "softmax_lse": constant(t, "fused_attn_fwd.softmax_lse", query, dtype=FP32, shape=(batch, heads, tokens)),
    }
    return tuple(local(f"{name}{number}", tensor) for name, tensor in made.items())


def fused_backward(engine: Autograd, query: Tensor, parts: Sequence[tuple[Tensor, Axis]]) -> list[Tensor]:
    """`fused_attn_bwd`: gradients of some tokens of queries, keys and values; its workspace goes when it returns."""
    shapes = [(of_tokens(x, tokens), x.dtype) for x, tokens in parts]
    results = [engine.prepare("fused_attn_bwd", shape, dtype) for shape, dtype in shapes]
    heads, key_heads = query.shape[2], parts[1][0].shape[2]
    (_, queries), (_, keys), *_ = parts
    expanded = of_tokens(query, keys)
    workspace = flash_workspace(
        engine, query, heads, key_heads, batch=query.shape[1], queries=queries, expanded=expanded
    )
    engine.kernel("fused_attn_bwd", results)
    engine.free(*workspace)
    return results
