"""The Mamba-2 mixer (Dao and Gu, arXiv:2405.21060), as transformers runs it without kernels of other packages.

Source: transformers models/mamba2/modeling_mamba2.py, whose mixer models/nemotron_h and models/granitemoehybrid share.
"""

from __future__ import annotations

import attrs

from hardware.dtypes import FP32
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks.feed_forward import activation
from simulator.blocks.linear import projection
from simulator.graph import Shape, Tensor
from simulator.model import StateSpaceSpec
from simulator.sizes import Dim, ceil_div
from simulator.trace import Frame, Trace

Axis = tuple[Dim, ...]

#: The parameters of a mixer in the order of ``model.parameters()``: its own before those of its modules.
STATE_SPACE = ("dt_bias", "A_log", "D", "conv1d", "in_proj", "norm", "out_proj")


@attrs.frozen(eq=False)
class _Own:
    """The vectors of a mixer, one number per head."""

    time_bias: Tensor
    decay: Tensor
    skip: Tensor


class _Dims:
    """The dimensions of one mixer."""

    def __init__(self, t: Trace, spec: StateSpaceSpec) -> None:
        tokens = t.dimensions.bindings["s"]
        self.groups: Axis = (t.dim("groups", spec.groups),)
        self.heads: Axis = (*self.groups, t.dim("heads/group", spec.heads // spec.groups))
        self.head: Axis = (t.dim("d_inner", spec.head_dim),)
        self.inner: Axis = (*self.heads, *self.head)
        self.state: Axis = (t.dim("state", spec.state),)
        self.channels: Axis = (t.dim("channels", spec.channels),)
        self.kernel: Axis = (t.dim("kernel", spec.kernel),)
        self.long: Axis = (t.dim("s+kernel-1", tokens + spec.kernel - 1),)
        chunks = ceil_div(tokens, spec.chunk)
        self.chunks: Axis = (t.dim("chunks", chunks),)
        self.more_chunks: Axis = (t.dim("chunks+1", chunks + 1),)
        self.chunk: Axis = (t.dim("chunk", spec.chunk),)
        self.padded: Axis = (*self.chunks, *self.chunk)
        self.uneven = bool(tokens % spec.chunk)


def mamba2_mixer(t: Trace, x: Tensor, spec: StateSpaceSpec, *, name: str = "mixer") -> Tensor:
    """`Mamba2Mixer`: projection, convolution, scan in chunks, gated norm, projection of ``[b, s, h]``.

    A mask of ones is left out as in masking_utils.py `create_recurrent_attention_mask`.

    Args:
        name: of the module.

    Raises:
        UnsupportedError: tokens of padding, which would be masked before and after the convolution.
    """
    if t.regime.attention_mask == "padded":
        raise UnsupportedError(
            "'attention_mask' must be none or full with state space layers: masking of padding is not modelled"
        )
    dims = _Dims(t, spec)
    rows = x.shape[:-1]
    with t.call(name, x) as local:
        time_bias, decay, skip = (t.vector(each, dims.heads) for each in ("dt_bias", "A_log", "D"))
        whole = (t.dim("d_in_proj", spec.inner + spec.channels + spec.heads),)
        projected = local("projected_states", projection(t, "in_proj", x, whole, spec.bias))
        with t.call("") as inner:
            decay = inner("A", ops.exp(t, inner("A", ops.to(t, decay, FP32))))
            decay = local("A", ops.neg(t, decay))
        parts = [(*rows, part) for part in (dims.inner, dims.channels, dims.heads)]
        gate, mixed, time = ops.split_with_sizes(t, projected, parts)
        mixed = local("hidden_states_B_C", _convolution(t, ops.transpose(t, mixed, 1, 2), dims, spec))
        mixed = ops.transpose(t, mixed, 1, 2)
        shared = (*dims.groups, *dims.state)
        hidden, keys, queries = ops.split_with_sizes(t, mixed, [(*rows, each) for each in (dims.inner, shared, shared)])
        hidden = ops.view(t, hidden, (*rows, dims.heads, dims.head))
        keys, queries = (ops.view(t, each, (*rows, dims.groups, dims.state)) for each in (keys, queries))
        scanned = local("scan_result", _scan(t, hidden, time, (keys, queries), _Own(time_bias, decay, skip), dims))
        scanned = local("scan_output", ops.reshape(t, scanned, (*rows, dims.inner)))
        scanned = local("scan_output", _gated_norm(t, scanned, gate, dims))
        with t.call("") as inner:
            return projection(t, "out_proj", inner("input", ops.to(t, scanned, x.dtype)), ("h",), spec.bias)


def _convolution(t: Trace, x: Tensor, dims: _Dims, spec: StateSpaceSpec) -> Tensor:
    """`causal_conv1d_fn`: a filter per channel over the tokens before, then the activation."""
    with t.call("conv1d"):
        weight = t.weights("weight", dims.channels, (), dims.kernel)
        bias = t.vector("bias", dims.channels) if spec.conv_bias else None
    with t.call("", x) as local:
        # squeezed and unsqueezed, the weight is no leaf, so that autocast does not keep its copy
        filters = ops.view(t, weight, weight.shape)
        with t.call("") as inner:
            wide = inner("input", ops.to(t, x, weight.dtype))
            padded = ops.convolution(t, wide, filters, bias, dims.long)
        out = local("out", ops.narrow(t, padded, (*padded.shape[:-1], ("s",))))
        out = local("out", activation(t, spec.activation, out))
        return ops.to(t, out, x.dtype)


def _scan(t: Trace, hidden: Tensor, time: Tensor, shared: tuple[Tensor, Tensor], own: _Own, dims: _Dims) -> Tensor:
    """`mamba2_chunk_scan`: ``[b, s, heads, head]``; the state that is left is not returned.

    Args:
        hidden: ``[b, s, heads, head]``.
        time: steps, ``[b, s, heads]``.
        shared: ``B`` and ``C`` of each group, ``[b, s, groups, state]``.
        own: the mixer's vectors.
    """
    with t.call("", hidden, time, *shared) as local:
        with t.call("") as inner:
            time = local("dt", ops.add(t, time, inner("dt_bias", ops.to(t, own.time_bias, time.dtype))))
        time = local("dt", ops.softplus(t, time))
        time = local("dt", ops.clamp(t, time))
        hidden = local("hidden_states", ops.to(t, hidden, FP32))
        keys, queries = (local(name, _per_head(t, each, dims)) for name, each in zip("BC", shared, strict=True))
        with t.call("") as inner:
            column = ops.view(t, own.skip, (dims.heads, ()))
            padded = inner("padded", ops.pad(t, hidden, 1, dims.padded))
            skipped = local("D_residual", ops.mul(t, column, padded))
        with t.call("") as inner:
            column = inner("dt", ops.to(t, ops.view(t, time, (*time.shape, ())), FP32))
            hidden = local("hidden_states", ops.mul(t, hidden, column))
        with t.call("") as inner:
            decay = local("A", ops.mul(t, own.decay, inner("dt", ops.to(t, time, FP32))))
        chunked = [_in_chunks(t, each, dims) for each in (hidden, decay, keys, queries)]
        for name, each in zip(("hidden_states", "A", "B", "C"), chunked, strict=True):
            local(name, each)
        out = local("output", _by_chunk(t, local, dims))
        out = local("output", ops.add(t, ops.reshape(t, out, skipped.shape), skipped))
        return _cut(t, out, dims)


def _tokens(x: Tensor, tokens: Axis) -> Shape:
    """The shape of `x` with other `tokens`."""
    return (x.shape[0], tokens, *x.shape[2:])


def _per_head(t: Trace, x: Tensor, dims: _Dims) -> Tensor:
    """``x.float().repeat_interleave(heads // groups, dim=2)``."""
    rows, last = x.shape[:2], x.shape[-1]
    with t.call("") as inner:
        return ops.clone(t, inner("float", ops.to(t, x, FP32)), (*rows, dims.heads, last))


def _in_chunks(t: Trace, x: Tensor, dims: _Dims) -> Tensor:
    """`reshape_into_chunks`."""
    with t.call("") as local:
        padded = local("input_tensor", ops.pad(t, x, 1, dims.padded))
        return ops.view(t, padded, (x.shape[0], dims.chunks, dims.chunk, *x.shape[2:]))


def _cut(t: Trace, x: Tensor, dims: _Dims) -> Tensor:
    """The scan's result without what the last chunk was padded with."""
    return ops.narrow(t, x, _tokens(x, ("s",)), axis=1) if dims.uneven else ops.rename(t, x, _tokens(x, ("s",)))


def _by_chunk(t: Trace, local: Frame, dims: _Dims) -> Tensor:
    """The recurrence: products inside each chunk, and one state from chunk to chunk; ``[b, chunks, chunk, ...]``.

    Args:
        local: the frame of `_scan`, in which all names below live.
    """
    decay = local("A", ops.permute(t, local.held("A"), 0, 3, 1, 2))
    summed = local("A_cumsum", ops.cumsum(t, decay, -1))
    keys, queries, hidden = (local.held(name) for name in ("B", "C", "hidden_states"))
    with t.call("") as inner:
        within = local("L", ops.exp(t, inner("segments", _segment_sum(t, decay))))
    scores = local("G", ops.einsum(t, "bclhn,bcshn->bclsh", queries, keys))
    scores = local("M", ops.mul(t, scores, ops.permute(t, within, 0, 2, 3, 4, 1)))
    diagonal = local("Y_diag", ops.einsum(t, "bclsh,bcshp->bclhp", scores, hidden))
    states = _carried(t, _states(t, local, summed), summed, local, dims)
    with t.call("") as inner:
        grown = local("state_decay_out", ops.exp(t, summed))
        read = local("C_times_states", ops.einsum(t, "bclhn,bchpn->bclhp", queries, states))
        column = ops.permute(t, grown, 0, 2, 3, 1)
        others = local("Y_off", ops.mul(t, read, ops.view(t, column, (*column.shape, ()))))
        return ops.contiguous(t, inner("sum", ops.add(t, diagonal, others)))


def _states(t: Trace, local: Frame, summed: Tensor) -> Tensor:
    """The state that each chunk alone would leave, ``[b, chunks, heads, head, state]``."""
    with t.call("") as inner:
        last = ops.narrow(t, summed, (*summed.shape[:-1], ()))
        left = inner("difference", ops.sub(t, last, summed))
        left = local("decay_states", ops.exp(t, left))
    column = ops.permute(t, left, 0, 2, 3, 1)
    decayed = local("B_decay", ops.mul(t, local.held("B"), ops.view(t, column, (*column.shape, ()))))
    return local("states", ops.einsum(t, "bclhn,bclhp->bchpn", decayed, local.held("hidden_states")))


def _carried(t: Trace, states: Tensor, summed: Tensor, local: Frame, dims: _Dims) -> Tensor:
    """The state that each chunk starts from."""
    first, rest = states.shape[0], states.shape[2:]
    zeros = ops.constant(t, "zeros_like.default", states, shape=(first, (), *rest))
    local("previous_states", zeros)
    states = local("states", ops.after_zeros(t, states, (first, dims.more_chunks, *rest)))
    with t.call("") as inner:
        last = ops.select(t, summed, -1)
        padded = ops.pad(t, last, len(last.shape) - 1, dims.more_chunks)
        segments = inner("segments", _segment_sum(t, padded))
        decay = local("decay_chunk", ops.transpose(t, ops.exp(t, segments), 1, 3))
    states = local("new_states", ops.einsum(t, "bzch,bzhpn->bchpn", decay, states))
    return local("states", ops.narrow(t, states, (first, dims.chunks, *rest), axis=1))


def _segment_sum(t: Trace, x: Tensor) -> Tensor:
    """`segment_sum`: sums of `x` between any two places of its last axis, minus infinity above the diagonal."""
    rows, columns = x.shape[-1], ops.apart(t, x.shape[-1])
    with t.call("") as local:
        wide = local("input_tensor", ops.expand(t, ops.view(t, x, (*x.shape, ())), (*x.shape, columns)))
        local("mask", ops.lower_triangle(t, wide, rows, columns))
        wide = local("input_tensor", ops.masked_fill(t, wide, _not(t, local.held("mask"))))
        wide = local("tensor_segsum", ops.cumsum(t, wide, -2))
        local("mask", ops.lower_triangle(t, wide, rows, columns))
        return ops.masked_fill(t, wide, _not(t, local.held("mask")))


def _not(t: Trace, mask: Tensor) -> Tensor:
    return ops.constant(t, "bitwise_not.default", mask)


def _gated_norm(t: Trace, x: Tensor, gate: Tensor, dims: _Dims) -> Tensor:
    """`MambaRMSNormGated`: statistics of each group, in fp32."""
    rows, dtype = x.shape[:-1], x.dtype
    with t.call("norm", x) as local:
        weight = t.vector("weight", dims.inner)
        with t.call("") as inner:
            wide = local("hidden_states", ops.to(t, x, FP32))
            opened = inner("gate", ops.silu(t, inner("gate", ops.to(t, gate, FP32))))
            hidden = local("hidden_states", ops.mul(t, wide, opened))
        groups = (*rows, dims.groups, dims.inner[len(dims.groups) :])
        grouped = local("hidden_states_group", ops.view(t, hidden, groups))
        variance = local("variance", ops.mean(t, ops.power(t, grouped)))
        scaled = ops.mul(t, grouped, ops.rsqrt(t, ops.add_scalar(t, variance)))
        hidden = local("hidden_states", ops.view(t, local("hidden_states_group", scaled), (*rows, dims.inner)))
        return ops.mul(t, weight, ops.to(t, hidden, dtype))
