"""Gated delta nets (Yang et al., arXiv:2412.06464): linear attention by a recurrence over chunks of the sequence.

Follows the PyTorch functions of models/qwen3_next/modeling_qwen3_next.py, which run without the packages
flash-linear-attention and causal-conv1d.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from hardware.dtypes import BOOL, FP32
from simulator import ops
from simulator.blocks.feed_forward import activation
from simulator.blocks.linear import projection
from simulator.graph import Tensor, flat
from simulator.model import DeltaNetSpec
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


def delta_heads(t: Trace, spec: DeltaNetSpec) -> Heads:
    """Bind the dimensions of a delta net."""
    keys = (t.dim("k_linear", spec.key_heads),)
    groups = (t.dim("g_linear", spec.groups),) if spec.groups > 1 else ()
    return Heads(keys, keys + groups, (t.dim("d_key", spec.key_dim),), (t.dim("d_value", spec.value_dim),))


#: Queries, keys and values, which the convolution runs over, ``[b, s, channels]``, gates ``[b, s, value heads, d]``,
#: and two numbers ``b`` and ``a`` per token and value head.
Projected = tuple[Tensor, Tensor, Tensor, Tensor]
#: Hidden states to what is projected from them; names live in the frame of the module.
Project = Callable[[Trace, Tensor, DeltaNetSpec, Frame], Projected]


def fused_projections(t: Trace, x: Tensor, spec: DeltaNetSpec, local: Frame) -> Projected:
    """`in_proj_qkvz` and `in_proj_ba`, cut head by head (`Qwen3NextGatedDeltaNet.fix_query_key_value_ordering`)."""
    heads = delta_heads(t, spec)
    rows, groups = x.shape[:-1], heads.values[len(heads.keys) :]
    each = spec.groups * spec.value_dim
    widths = (t.dim("qkvz", 2 * spec.key_dim + 2 * each), t.dim("ba", 2 * spec.groups))
    mixed = []
    for name, width in zip(("qkvz", "ba"), widths, strict=True):
        made = local(f"projected_states_{name}", projection(t, f"in_proj_{name}", x, (*heads.keys, width), False))
        mixed.append(ops.view(t, made, (*rows, heads.keys, (width,))))
    cuts = (heads.key_dim, heads.key_dim, groups + heads.value_dim, groups + heads.value_dim)
    query, key, value, z = ops.split_with_sizes(t, mixed[0], [(*rows, heads.keys, cut) for cut in cuts])
    b, a = ops.split_with_sizes(t, mixed[1], [(*rows, heads.keys, groups)] * 2)
    apart = bool(groups)  # the values of a key head's group lie side by side, those of two heads do not
    by_head = (*rows, heads.values, heads.value_dim)
    value, z = (local(name, _joined(t, part, by_head, apart)) for name, part in (("value", value), ("z", z)))
    b, a = (local(name, _joined(t, part, (*rows, heads.values), apart)) for name, part in (("b", b), ("a", a)))
    parts = [_joined(t, part, (*rows, heads.keys + heads.key_dim), True) for part in (query, key)]
    parts.append(_joined(t, value, (*rows, heads.values + heads.value_dim), not apart))
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        local(name, part)
    shape = (*rows, (t.dim("channels", spec.channels),))
    return local("mixed_qkv", ops.cat(t, parts, shape, flat(shape))), z, b, a


def separate_projections(
    t: Trace, x: Tensor, spec: DeltaNetSpec, local: Frame
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A projection each (models/qwen3_5/modeling_qwen3_5.py `Qwen3_5GatedDeltaNet`)."""
    heads = delta_heads(t, spec)
    mixed = local("mixed_qkv", projection(t, "in_proj_qkv", x, (t.dim("channels", spec.channels),), False))
    z = projection(t, "in_proj_z", x, heads.values + heads.value_dim, False)
    z = local("z", ops.view(t, z, (*x.shape[:-1], heads.values, heads.value_dim)))
    b, a = (local(name, projection(t, f"in_proj_{name}", x, heads.values, False)) for name in ("b", "a"))
    return mixed, z, b, a


def _joined(t: Trace, part: Tensor, shape: tuple[Axis, ...], apart: bool) -> Tensor:
    """``part.reshape(shape)``: a copy where it joins several heads that lie `apart` in memory."""
    if apart and part.shape[2]:
        part = ops.clone(t, part)
    return ops.view(t, part, shape)


def gated_delta_net(t: Trace, x: Tensor, mask: Tensor | None, spec: DeltaNetSpec, *, project: Project) -> Tensor:
    """`Qwen3NextGatedDeltaNet`.

    Args:
        x: hidden states ``[b, s, h]``.
        mask: 1 for tokens and 0 for padding, ``[b, s]``; None where there is none.
        project: the projections of the family.
    """
    heads = delta_heads(t, spec)
    with t.call("linear_attn", x) as local:
        if mask is not None:
            x = local("hidden_states", ops.mask_rows(t, x, mask))
        mixed, z, b, a = project(t, x, spec, local)
        mixed = local("mixed_qkv", ops.transpose(t, mixed, 1, 2))
        mixed = local("mixed_qkv", _causal_conv1d(t, mixed, spec))
        mixed = local("mixed_qkv", ops.transpose(t, mixed, 1, 2))
        beta, decay, states = _states(t, mixed, b, a, heads, local)
        out = local("core_attn_out", _chunk_gated_delta_rule(t, *states, decay, beta, heads))
        gate, rows = z.shape, (flat(z.shape[:-1]), z.shape[-1])
        out = local("core_attn_out", ops.reshape(t, out, rows))
        if not z.dense and heads.values != heads.keys:  # part of the only key head: between its rows lies the rest
            z = ops.clone(t, z)
        z = local("z", ops.reshape(t, z, rows))
        out = local("core_attn_out", _gated_norm(t, out, z))
        out = local("core_attn_out", ops.view(t, out, (*gate[:2], gate[2] + gate[3])))
        return projection(t, "out_proj", out, ("h",), False)


def _states(
    t: Trace, mixed: Tensor, b: Tensor, a: Tensor, heads: Heads, local: Frame
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Learning rate and log decay of each token and value head; queries, keys and values by head."""
    rows = mixed.shape[:2]
    axes = ((heads.keys, heads.key_dim), (heads.keys, heads.key_dim), (heads.values, heads.value_dim))
    parts = ops.split_with_sizes(t, mixed, [(*rows, own + d) for own, d in axes])
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        local(name, part)
    query, key, value = (ops.view(t, part, (*rows, *own)) for part, own in zip(parts, axes, strict=True))
    beta = local("beta", ops.sigmoid(t, b))
    rate = ops.neg(t, ops.exp(t, ops.to(t, t.vector("A_log", heads.values), FP32)))
    step = ops.softplus(t, ops.add(t, ops.to(t, a, FP32), t.vector("dt_bias", heads.values)))
    decay = local("g", ops.mul(t, rate, step))
    return beta, decay, (query, key, value)


def _causal_conv1d(t: Trace, x: Tensor, spec: DeltaNetSpec) -> Tensor:
    """`causal_conv1d_fn`: a filter per channel of `x` ``[b, channels, s]``, cut to its length, and an activation."""
    with t.call("conv1d"):
        weight = t.weights("weight", x.shape[1], (), (t.dim("kernel", spec.kernel),))
    with t.call("", x) as local:
        weight = ops.view(t, weight, weight.shape, "squeeze.dim")
        longer = x.shape[2] if spec.kernel == 1 else (t.dim("s_padded", t.dimensions.bindings["s"] + spec.kernel - 1),)
        with t.call("") as inner:
            out = ops.conv1d(t, inner("input", ops.to(t, x, weight.dtype)), weight, longer)
        if spec.kernel > 1:
            out = ops.narrow(t, out, x.shape)
        out = local("out", out)
        return ops.to(t, local("out", activation(t, spec.activation, out)), x.dtype)


def _gated_norm(t: Trace, x: Tensor, gate: Tensor) -> Tensor:
    """`Qwen3NextRMSNormGated`: a norm of each head in fp32, times an activated gate."""
    with t.call("norm", x, gate) as local:
        dtype = x.dtype
        weight = t.vector("weight", x.shape[-1])
        hidden = local("hidden_states", ops.to(t, x, FP32))
        variance = local("variance", ops.mean(t, ops.power(t, hidden)))
        hidden = local("hidden_states", ops.mul(t, hidden, ops.rsqrt(t, ops.add_scalar(t, variance))))
        hidden = local("hidden_states", ops.mul(t, weight, ops.to(t, hidden, dtype)))
        hidden = local("hidden_states", ops.mul(t, hidden, ops.silu(t, ops.to(t, gate, FP32))))
        return ops.to(t, hidden, dtype)


def _chunk_gated_delta_rule(
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
        out = (ops.renamed if whole else ops.crop)(t, out, 2, sequence)
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
    decay = local("decay", ops.view(t, decay, axes))
    square = (("chunk",), ("chunk",))
    ones = ops.constant(t, "ones.default", query, dtype=BOOL, shape=square)
    mask = local("strictly_upper_mask", ops.constant(t, "triu.default", ones))
    total = local("cum_decay", ops.cumulative_sum(t, decay))
    rows = ops.view(t, total, (*axes, ()), "unsqueeze.default")
    columns = ops.view(t, total, (*axes[:3], (), axes[3]), "unsqueeze.default")
    pairs = local("pairwise_decay", ops.outer_difference(t, rows, columns, (*axes[:3], *square)))
    pairs = local("pairwise_decay", ops.masked_fill(t, pairs, mask))
    pairs = local("pairwise_decay", ops.exp(t, pairs))
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
        begin = len(t.graph.ops)
        last = ops.narrow(t, total, (*axes[:3], ()))
        key = local("key", ops.mul(t, key, _column(t, ops.exp(t, ops.sub(t, last, total)))))
        fades = ops.view(t, ops.exp(t, ops.select(t, total, 3)), (*axes[:3], (), ()), "unsqueeze.default")
        fades = local("chunk_decay", fades)
        if "chunks" in t.dimensions.ones:  # only the state after the last chunk, which nobody reads, comes from them
            ops.unread(t, t.graph.ops[begin:], local)
        return _scan(t, Chunks(query, key, values, read, inside, fades), state, out, local, carried)


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
