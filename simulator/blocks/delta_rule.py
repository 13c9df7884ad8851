"""The gated delta rule (Yang et al., arXiv:2412.06464): a state that decays and is corrected, chunk by chunk.

Follows `torch_chunk_gated_delta_rule` (models/qwen3_next/modeling_qwen3_next.py).
"""

from __future__ import annotations

import attrs

from hardware.dtypes import BOOL, FP32
from simulator import ops
from simulator.graph import Tensor
from simulator.ops.matmul import Axis
from simulator.sizes import ceil_div
from simulator.trace import Frame, Trace

#: Default ``chunk_size`` of `torch_chunk_gated_delta_rule`.
CHUNK = 64
#: Turns of the loop over chunks that are built: the first, whose state needs no gradient, and the last three, which
#: in backward find other buffers. Those between are like the first of these three.
BUILT_TURNS = 4


@attrs.frozen
class Heads:
    """Names of the dimensions of a delta net."""

    keys: Axis
    """Heads of queries and keys."""
    values: Axis
    """Heads of values: those of keys times groups."""
    key_dim: Axis
    value_dim: Axis


def chunk_gated_delta_rule(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, heads: Heads
) -> Tensor:
    """`torch_chunk_gated_delta_rule`: ``[b, s, heads, d]`` to ``[b, s, value heads, d]``."""
    given = (query, key, value, beta, decay)
    with t.call("", *given) as local:
        dtype, sequence = query.dtype, query.shape[1]
        if heads.keys != heads.values:
            query = local("query", _repeat(t, query, heads))
            key = local("key", _repeat(t, key, heads))
        names = ("query", "key", "value", "beta", "decay")
        given = (query, key, value, beta, decay)
        made = [ops.to(t, ops.transpose(t, x, 1, 2), FP32, contiguous=True) for x in given]
        query, key, value, beta, decay = _bound(local, names, made)
        query = local("query", _l2norm(t, query))
        key = local("key", _l2norm(t, key))
        query = local("query", ops.mul_scalar(t, query))
        chunks = t.dim("chunks", ceil_div(t.dimensions.bindings["s"], CHUNK))
        padded = (chunks, t.dim("chunk", CHUNK))
        query, key, value = _bound(local, names[:3], [ops.pad(t, x, 2, padded) for x in (query, key, value)])
        beta, decay = _bound(local, names[3:], [ops.pad(t, x, 2, padded) for x in (beta, decay)])
        out = _over_chunks(t, [query, key, value, beta, decay], local)
        out = local("core_attn_out", ops.reshape(t, out, (*value.shape[:2], padded, value.shape[3])))
        whole = t.dimensions.bindings["s"] % CHUNK == 0
        shape = (*out.shape[:2], sequence, out.shape[3])
        out = ops.rename(t, out, shape) if whole else ops.narrow(t, out, shape, axis=2)
        out = local("core_attn_out", out)
        return ops.to(t, ops.transpose(t, out, 1, 2), dtype, contiguous=True)


def _bound(local: Frame, names: tuple[str, ...], tensors: list[Tensor]) -> list[Tensor]:
    """Several names bound at once, when all values are there."""
    return [local(name, tensor) for name, tensor in zip(names, tensors, strict=True)]


def _repeat(t: Trace, x: Tensor, heads: Heads) -> Tensor:
    """``x.repeat_interleave(groups, dim=2)``: a copy for each value head."""
    return ops.clone(t, x, t.squeezed((*x.shape[:2], heads.values, x.shape[3])))


def _l2norm(t: Trace, x: Tensor) -> Tensor:
    """`l2norm` over the last axis."""
    with t.call("", x) as local:
        scale = ops.rsqrt(t, ops.add_scalar(t, ops.sum_last(t, ops.mul(t, x, x))))
        return ops.mul(t, x, local("inv_norm", scale))


def _column(t: Trace, x: Tensor) -> Tensor:
    return ops.view(t, x, (*x.shape, ()), "unsqueeze.default")


def _over_chunks(t: Trace, padded: list[Tensor], local: Frame) -> Tensor:
    """What each chunk computes on its own, then the scan: ``[b, heads, chunks, chunk, d]``, column-major."""
    query, key, value, beta, decay = padded
    v_beta = local("v_beta", ops.mul(t, value, _column(t, beta)))
    k_beta = local("k_beta", ops.mul(t, key, _column(t, beta)))
    axes = (*query.shape[:2], ("chunks",), ("chunk",))
    split = [ops.view(t, x, (*axes, x.shape[3])) for x in (query, key, k_beta, v_beta)]
    query, key, k_beta, v_beta = _bound(local, ("query", "key", "k_beta", "v_beta"), split)
    total, pairs = _decays(t, local("decay", ops.view(t, decay, axes)), local)
    system = local("ut_system", ops.mul(t, ops.matmul(t, k_beta, ops.transpose(t, key, 3, 4)), pairs))
    inside = local("intra_chunk_attn", ops.mul(t, ops.matmul(t, query, ops.transpose(t, key, 3, 4)), pairs))
    decayed = local("decayed_k_beta", ops.mul(t, k_beta, _column(t, ops.exp(t, total))))
    values = local("new_values", ops.solve_triangular(t, system, v_beta))
    read = local("k_cumdecay", ops.solve_triangular(t, system, decayed))
    with t.call("") as carried:
        shape = (*axes[:2], key.shape[4], value.shape[3])
        state = carried("last_recurrent_state", ops.constant(t, "zeros.default", values, shape=shape))
        out = local("core_attn_out", _zeros_like(t, values))
        query = local("query", ops.mul(t, query, _column(t, ops.exp(t, total))))
        key, fades = _faded(t, key, total, local)
        return _scan(t, Chunks(query, key, values, read, inside, fades), state, out, local, carried)


def _decays(t: Trace, decay: Tensor, local: Frame) -> tuple[Tensor, Tensor]:
    """Log decay from the start of a chunk, and the decay between each two of its tokens."""
    axes, square = decay.shape, (("chunk",), ("chunk",))
    ones = ops.constant(t, "ones.default", decay, dtype=BOOL, shape=square)
    mask = local("strictly_upper_mask", ops.constant(t, "triu.default", ones))
    total = local("cum_decay", ops.cumsum(t, decay, -1))
    rows = ops.view(t, total, (*axes, ()), "unsqueeze.default")
    columns = ops.view(t, total, (*axes[:3], (), axes[3]), "unsqueeze.default")
    pairs = local("pairwise_decay", ops.sub(t, rows, columns, shape=(*axes[:3], *square)))
    pairs = local("pairwise_decay", ops.masked_fill(t, pairs, mask))
    return total, local("pairwise_decay", ops.exp(t, pairs))


def _faded(t: Trace, key: Tensor, total: Tensor, local: Frame) -> tuple[Tensor, Tensor]:
    """Keys decayed to the end of their chunk, and the decay of each whole chunk."""
    begin, axes = len(t.graph.ops), total.shape[:3]
    last = ops.narrow(t, total, (*axes, ()))
    key = local("key", ops.mul(t, key, _column(t, ops.exp(t, ops.sub(t, last, total)))))
    fades = ops.view(t, ops.exp(t, ops.select(t, total, 3)), (*axes, (), ()), "unsqueeze.default")
    fades = local("chunk_decay", fades)
    if "chunks" in t.dimensions.ones:  # only the state after the last chunk, which nobody reads, comes from them
        ops.unread(t, t.graph.ops[begin:], local)
    return key, fades


def _zeros_like(t: Trace, x: Tensor) -> Tensor:
    """``torch.zeros_like``: as dense `x` lies in memory."""
    out = t.fresh("zeros_like.default", x.shape, x.dtype, x.memory)
    return t.emit("zeros_like.default", [x], [out])[0]


@attrs.frozen
class Chunks:
    """What the scan reads of every chunk, by the names of the source; axis 2 counts the chunks."""

    query: Tensor
    key: Tensor
    new_values: Tensor
    k_cumdecay: Tensor
    intra_chunk_attn: Tensor
    chunk_decay: Tensor


def _scan(t: Trace, chunks: Chunks, state: Tensor, out: Tensor, local: Frame, carried: Frame) -> Tensor:
    """The loop over chunks: few of its turns are built, the others save what these do."""
    count = int(t.dimensions.bindings["chunks"])
    built = min(count, BUILT_TURNS)
    others, begins = None, []
    for turn in range(built):
        if turn == 1 and count > built:
            state, others = ops.other_turns(t, state)
            carried("last_recurrent_state", state)
        begins.append(len(t.graph.ops))
        out = _write_chunk(t, chunks, state, out, local)
        update = len(t.graph.ops)
        state = carried("last_recurrent_state", _next_state(t, chunks, state, local.held("v_new")))
    if others is not None:
        ops.repeat_turn(t, others, t.graph.ops[begins[1] : begins[2]], t.dim("other_chunks", count - built))
    ops.unread(t, t.graph.ops[update:], carried)
    return out


def _write_chunk(t: Trace, chunks: Chunks, state: Tensor, out: Tensor, local: Frame) -> Tensor:
    """One chunk's output: what it reads of the state and what it attends to inside, written into `out`."""
    fresh = ops.select(t, chunks.new_values, 2)
    fresh = local("v_new", ops.sub(t, fresh, ops.matmul(t, ops.select(t, chunks.k_cumdecay, 2), state)))
    between = local("inter_chunk_attn", ops.matmul(t, ops.select(t, chunks.query, 2), state))
    inside = ops.matmul(t, ops.select(t, chunks.intra_chunk_attn, 2), fresh)
    return local("core_attn_out", ops.write_row(t, out, ops.add(t, between, inside)))


def _next_state(t: Trace, chunks: Chunks, state: Tensor, fresh: Tensor) -> Tensor:
    """The state after a chunk: decayed, and with its new values."""
    kept = ops.mul(t, state, ops.select(t, chunks.chunk_decay, 2))
    return ops.add(t, kept, ops.matmul(t, ops.transpose(t, ops.select(t, chunks.key, 2), 2, 3), fresh))
