"""Scaled dot-product attention: the fused kernels, the composite fallback, and torch's choice among them."""

from __future__ import annotations

from hardware.dtypes import BF16, BOOL, FP16, FP32, INT64, UINT64
from hardware.errors import UsageError
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.ops.dropout import dropout
from simulator.ops.elementwise import add, autocast, constant, mul_scalar, to
from simulator.ops.matmul import matmul
from simulator.ops.shape import clone, transpose
from simulator.ops.softmax import softmax
from simulator.sizes import round_up
from simulator.trace import Regime, Trace

Gradients = list[Tensor | None]

#: Largest head dimension of the flash kernel (torch aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
FLASH_MAX_HEAD_DIM = 256
#: The memory-efficient kernel pads its log-sum-exp rows to this many queries
#: (torch aten/src/ATen/native/transformers/cuda/attention.cu, kAlignLSE).
LOGSUMEXP_ALIGNMENT = 32


def choose_kernel(regime: Regime, query: Tensor, head_dim: int, *, masked: bool, grouped: bool) -> str:
    """The kernel that torch's ``auto`` takes: flash, else memory-efficient, else math.

    Source: torch aten/src/ATen/native/transformers/cuda/sdp_utils.cpp `select_sdp_backend` and its constraints.
    """
    can = {
        "flash": query.dtype in (BF16, FP16) and not masked and head_dim <= FLASH_MAX_HEAD_DIM,
        "efficient": not grouped and head_dim % (4 if query.dtype == FP32 else 8) == 0,
        "math": True,
    }
    if regime.sdpa_backend == "auto":
        return next(kernel for kernel, possible in can.items() if possible)
    return regime.sdpa_backend if can[regime.sdpa_backend] else "math"


def scaled_dot_product_attention(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float, head_dim: int
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on ``[batch, heads, sequence, head_dim]``.

    Args:
        mask: an additive mask; None means causal.
        rate: dropout probability on the attention weights.
        head_dim: value of the head dimension, which decides what kernels are possible.
    """
    value = autocast(t, value)
    key = autocast(t, key)
    query = autocast(t, query)
    grouped = key.shape[1] != query.shape[1]
    kernel = choose_kernel(t.regime, query, head_dim, masked=mask is not None, grouped=grouped)
    if kernel == "math":
        return _math(t, query, key, value, mask, rate)
    if kernel == "flash":
        return _flash(t, query, key, value)
    return _efficient(t, query, key, value, mask)


def _flash(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Saves q, k, v, the output, fp32 log-sum-exp per query and 24 B of random state (arXiv 2205.14135)."""
    name = "_scaled_dot_product_flash_attention"
    out = t.fresh(f"{name}.default", query.shape, query.dtype, _by_token(query))
    logsumexp = t.fresh(f"{name}.logsumexp", query.shape[:3], FP32)
    random = [t.fresh(f"{name}.rng_state", ((2,),), UINT64), t.fresh(f"{name}.unused", (), UINT64)]
    outputs = [out, logsumexp, *random]
    inputs = [query, key, value]
    t.emit(f"{name}.default", inputs, outputs, saves=[*inputs, *outputs], backward=_attention_backward)
    return out


def _efficient(t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As flash, with padded log-sum-exp and the mask among the saved (arXiv 2112.05682)."""
    name = "_scaled_dot_product_efficient_attention"
    out = t.fresh(f"{name}.default", query.shape, query.dtype, _by_token(query))
    padded = t.dim("s_pad32", round_up(t.dimensions.bindings["s"], LOGSUMEXP_ALIGNMENT))
    logsumexp = t.fresh(f"{name}.logsumexp", (*query.shape[:2], (padded,)), FP32)
    random = [t.fresh(f"{name}.philox_{part}", (), INT64) for part in ("seed", "offset")]
    outputs = [out, logsumexp, *random]
    inputs = [query, key, value] + ([mask] if mask is not None else [])
    t.emit(f"{name}.default", inputs, outputs, saves=[*inputs, *outputs], backward=_attention_backward)
    return out


def _by_token(query: Tensor) -> tuple[str | int, ...]:
    """Memory order of a fused kernel's output: all heads of a token together."""
    batch, heads, sequence, dim = query.shape
    return (*batch, *sequence, *heads, *dim)


def _attention_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    results = [engine.prepare("attention_backward", x.shape, x.dtype, x.memory) for x in op.inputs[:3]]
    engine.kernel(op.name.replace(".default", "_backward.default"), results)
    return [*results, *([None] * (len(op.inputs) - 3))]


def _math(t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """`_scaled_dot_product_attention_math` (torch aten/src/ATen/native/transformers/attention.cpp).

    Low precision is computed in fp32; the scaling is split between q and k; a causal mask is built at every call.
    """
    origin = query.dtype
    with t.call("", query, key, value) as local:
        query, key, value = (local(n, to(t, x, FP32)) for n, x in (("q", query), ("k", key), ("v", value)))
        scaled = local("scaled", mul_scalar(t, query, "mul.Scalar"))
        if mask is None:
            mask = local("mask", _causal_mask(t, query))
        if key.shape[1] != query.shape[1]:
            value = local("v_expanded", clone(t, value, (value.shape[0], query.shape[1], *value.shape[2:])))
            key = local("k_expanded", clone(t, key, (key.shape[0], query.shape[1], *key.shape[2:])))
        transposed = mul_scalar(t, transpose(t, key, 2, 3), "mul.Scalar")
        weights = local("weights", matmul(t, scaled, transposed))
        weights = local("weights", add(t, weights, mask))
        weights = local("weights", softmax(t, weights, name="_safe_softmax.default"))
        weights = local("weights", dropout(t, weights, rate))
        if origin != FP32:
            local("returned", constant(t, "_to_copy.default", weights, dtype=origin))
        return to(t, matmul(t, weights, value), origin)


def _causal_mask(t: Trace, query: Tensor) -> Tensor:
    with t.call("") as local:
        sequence = query.shape[2]
        ones = constant(t, "ones.default", query, dtype=BOOL, shape=(sequence, sequence))
        lower = local("lower", constant(t, "tril.default", ones, dtype=BOOL))
        for name in ("allowed", "forbidden"):
            local(name, constant(t, "scalar_tensor.default", query, shape=()))
        return constant(t, "where.self", lower, dtype=query.dtype)


def require_kernel(name: str) -> str:
    """`name` if it is a kernel of SDPA; `UsageError` otherwise."""
    kernels = ("auto", "flash", "efficient", "math")
    if name not in kernels:
        raise UsageError(f"'sdpa_backend' must be one of {', '.join(kernels)}: {name!r}")
    return name
