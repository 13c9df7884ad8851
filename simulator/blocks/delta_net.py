"""Gated delta nets (Yang et al., arXiv:2412.06464): a short convolution, the gated delta rule, a gated norm.

Follows the PyTorch functions of models/qwen3_next/modeling_qwen3_next.py, which run without the packages
flash-linear-attention and causal-conv1d.
"""

from __future__ import annotations

from collections.abc import Callable

from hardware.dtypes import FP32
from simulator import ops
from simulator.blocks.delta_rule import Heads, chunk_gated_delta_rule
from simulator.blocks.feed_forward import activation
from simulator.blocks.linear import projection
from simulator.graph import Tensor, flat
from simulator.model import DeltaNetSpec
from simulator.ops.matmul import Axis
from simulator.trace import Frame, Trace


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


def separate_projections(t: Trace, x: Tensor, spec: DeltaNetSpec, local: Frame) -> Projected:
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
        out = local("core_attn_out", chunk_gated_delta_rule(t, *states, decay, beta, heads))
        gate, rows = z.shape, (flat(z.shape[:-1]), z.shape[-1])
        if not out.dense and out.shape[0]:  # between the sequences of a batch lies the padding
            out = ops.clone(t, out)
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
            out = ops.convolution(t, inner("input", ops.to(t, x, weight.dtype)), weight, None, longer)
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
