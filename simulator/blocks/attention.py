"""Attention: the interfaces that ``attn_implementation`` names, and the module around them."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

from hardware.dtypes import FP32
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks.heads import States, head_dims, separate_states
from simulator.blocks.linear import projection
from simulator.blocks.rotary import Rotate, liger_rotate, rotate
from simulator.graph import ATTENTION_CORE, Tensor
from simulator.model import AttentionSpec
from simulator.sizes import Dim
from simulator.trace import Trace

#: Queries, keys, values ``[b, a, s, d]`` and mask to the output ``[b, s, a, d]`` and the weights of attention.
Interface = Callable[[Trace, Tensor, Tensor, Tensor, "Tensor | None", AttentionSpec], "tuple[Tensor, Tensor | None]"]


class Softmax(Enum):
    """How a family spells the softmax of eager attention."""

    FP32 = "in fp32, back to the dtype of the queries; the output is made contiguous (Llama)"
    TO_VALUES = "as it comes, then to the dtype of the values; the output stays a view (GPT-2)"
    PLAIN = "as it comes; the output is made contiguous (BERT, Llama 4)"


def repeat_kv(t: Trace, x: Tensor, heads: tuple[Dim, ...]) -> Tensor:
    """`repeat_kv`: keys or values for every query head of their group; nothing without groups.

    ``expand`` then ``reshape``: several heads have to be copied, a single one remains a view of stride 0.
    """
    shape = (x.shape[0], heads, *x.shape[2:])
    if x.shape[1] == heads:
        return x
    return ops.clone(t, x, shape) if x.shape[1] else ops.expand(t, x, shape)


def eager_attention(
    t: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    spec: AttentionSpec,
    softmax: Softmax,
) -> tuple[Tensor, Tensor]:
    """`eager_attention_forward` in the spelling `softmax`; returns output and weights."""
    with t.call("", query, key, value) as local:
        key = local("key", repeat_kv(t, key, query.shape[1]))
        value = local("value", repeat_kv(t, value, query.shape[1]))
        weights = local("weights", ops.mul_scalar(t, ops.matmul(t, query, ops.transpose(t, key, 2, 3))))
        if spec.softcap is not None:
            weights = local("weights", ops.div_scalar(t, weights))
            weights = local("weights", ops.tanh(t, weights))
            weights = local("weights", ops.mul_scalar(t, weights))
        if mask is not None:
            weights = local("weights", ops.add(t, weights, mask))
        if softmax is Softmax.FP32:
            weights = local("weights", ops.to(t, ops.softmax(t, weights, FP32), query.dtype))
        else:
            weights = local("weights", ops.softmax(t, weights))
        if softmax is Softmax.TO_VALUES:
            weights = local("weights", ops.to(t, weights, value.dtype))
        weights = local("weights", ops.dropout(t, weights, spec.dropout))
        output = ops.transpose(t, ops.matmul(t, weights, value), 1, 2)
        return (output if softmax is Softmax.TO_VALUES else ops.contiguous(t, output)), weights


def sdpa_attention(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> Tensor:
    """`sdpa_attention_forward` (integrations/sdpa_attention.py): grouped keys are passed on only without a mask."""
    if spec.softcap is not None:
        raise UnsupportedError(
            "'attention' must be eager or flash_attention_2 with soft-capped scores: 'sdpa' has none"
        )
    if t.regime.context_parallel is not None:
        if query.dtype == FP32:
            raise UnsupportedError(
                "'cp' above 1 is modelled with the flash kernel alone, which has no fp32: use bf16, or fsdp2 with "
                "param_dtype=bf16"
            )
        out = ops.ring_attention(t, query, key, value)
        with t.call("", query, key, value) as local:
            return ops.contiguous(t, ops.transpose(t, local("out", out), 1, 2))
    grouped = t.regime.torch >= (2, 5) and mask is None and spec.head_dim <= 256
    if not grouped:
        key, value = (repeat_kv(t, x, query.shape[1]) for x in (key, value))
    with t.call("", query, key, value) as local:
        out = ops.scaled_dot_product_attention(
            t, query, key, value, mask, spec.dropout, spec.head_dim, causal=spec.causal
        )
        local("out", out)
        return ops.contiguous(t, ops.transpose(t, out, 1, 2))


def flash_attention_2(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`flash_attention_forward` (integrations/flash_attention.py): token-major views, 16 bits, no dense mask."""
    if t.regime.attention_mask == "padded":
        raise UnsupportedError(
            "'attention_mask' must be none or full with flash_attention_2: unpadding is not modelled; use sdpa or eager"
        )
    if t.regime.autocast is None and query.dtype == FP32:
        raise UnsupportedError(
            "'dtype' must be 16-bit or autocast with flash_attention_2, not fp32: the kernel has no fp32; use sdpa"
        )
    with t.call("", query, key, value) as local:
        views = [local(f"view{i}", ops.transpose(t, x, 1, 2)) for i, x in enumerate((query, key, value))]
        if views[2].shape[-1] != views[0].shape[-1]:  # the kernel knows one head dimension (latent attention has two)
            views[2] = local("view2", ops.pad_last(t, views[2], views[0].shape[-1]))
        low = [local(f"low{i}", ops.to(t, x, t.regime.autocast or x.dtype)) for i, x in enumerate(views)]
        out = local("out", ops.flash_attention_2(t, *low))
        narrower = (*out.shape[:-1], value.shape[-1])
        return out if out.shape == narrower else ops.narrow(t, out, narrower)


def attention(
    t: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    spec: AttentionSpec,
    softmax: Softmax = Softmax.FP32,
) -> tuple[Tensor, Tensor | None]:
    """The attention interface that ``attn_implementation`` names; returns output ``[b, s, a, d]`` and weights."""
    with t.part(ATTENTION_CORE):
        if t.regime.attention == "eager":
            return eager_attention(t, query, key, value, mask, spec, softmax)
        if t.regime.attention == "flash_attention_2":
            return flash_attention_2(t, query, key, value), None
        if t.regime.attention == "sdpa":
            return sdpa_attention(t, query, key, value, mask, spec), None
    raise UnsupportedError(
        f"'attention' {t.regime.attention} is not modelled for implementation {t.regime.implementation!r}; use sdpa"
    )


def rotary_attention(
    t: Trace,
    x: Tensor,
    tables: tuple[Tensor, ...],
    mask: Tensor | None,
    spec: AttentionSpec,
    *,
    states: States = separate_states,
    rotate: Rotate = rotate,
    interface: Interface = attention,
) -> tuple[Tensor, Tensor | None]:
    """`LlamaAttention`: q, k, v projections, rotary positions, attention, output projection; and the weights.

    Args:
        states: how queries, keys and values are projected.
        rotate: how rotary positions are applied, where the layer has them.
        interface: what attends; by default what ``attn_implementation`` names, with a softmax in fp32.
    """
    heads, _, d = head_dims(t, spec)
    with t.call("self_attn", x) as local:
        query, key, value = states(t, x, spec, local)
        if spec.rotary:
            turn = liger_rotate if t.regime.liger.rope else rotate
            query, key = turn(t, query, key, *tables)
            local("q", query)
            local("k", key)
        out, weights = interface(t, query, key, value, mask, spec)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        return projection(t, "o_proj", out, ("h",), spec.out_bias), weights


def causal_flash(t: Trace, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """``F.scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)`` on token-major ``[b, s, a, d]``."""
    for field, only in (("attention", "sdpa"), ("attention_mask", "none")):
        value_given = getattr(t.regime, field)
        if value_given != only:
            raise UnsupportedError(
                f"{field!r} must be {only} with implementation {t.regime.implementation!r}, not {value_given!r}"
            )
    by_head = [ops.transpose(t, x, 1, 2) for x in (query, key, value)]
    with t.call("", *by_head):
        query, key, value = by_head
        out = ops.scaled_dot_product_attention(t, query, key, value, None, 0.0, spec.head_dim)
    return ops.transpose(t, out, 1, 2)
