"""Scaled dot-product attention: the fused kernels, the composite fallback, and torch's choice among them."""

from __future__ import annotations

from hardware.dtypes import BF16, BOOL, FP16, FP32, INT64, UINT64
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor, flat
from simulator.ops.dropout import dropout
from simulator.ops.elementwise import add, autocast, constant, mul_scalar, to
from simulator.ops.matmul import matmul
from simulator.ops.shape import clone, narrow, transpose
from simulator.ops.softmax import softmax
from simulator.sizes import Dim, product, round_up
from simulator.trace import Regime, Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]

#: Largest head dimension of the flash kernel (torch aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
FLASH_MAX_HEAD_DIM = 256
#: Block of queries, and of head dimensions up to and above 128, that the flash backward rounds up to
#: (torch aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp `mha_bwd`).
FLASH_QUERY_BLOCK = 128
FLASH_DIM_BLOCKS = (32, 64)
#: Head dimensions are padded to a multiple of this (attention.cpp `pad_last_dim<8>`).
FLASH_DIM_STEP = 8
#: The memory-efficient kernel wants the rows of its mask aligned to this many elements
#: (torch aten/src/ATen/native/transformers/attention.cpp `pad_bias`).
MASK_ALIGNMENT = 8
#: The memory-efficient kernel pads its log-sum-exp rows to this many queries
#: (torch aten/src/ATen/native/transformers/cuda/attention.cu, kAlignLSE).
LOGSUMEXP_ALIGNMENT = 32


def choose_kernel(
    regime: Regime, query: Tensor, head_dim: int, *, masked: bool, grouped: bool, alike: bool = True
) -> str:
    """The kernel that torch's ``auto`` takes: flash, else memory-efficient, else math.

    Source: torch aten/src/ATen/native/transformers/cuda/sdp_utils.cpp `select_sdp_backend` and its constraints.
    """
    can = {
        "flash": query.dtype in (BF16, FP16) and not masked and head_dim <= FLASH_MAX_HEAD_DIM and alike,
        "efficient": not grouped and head_dim % (4 if query.dtype == FP32 else 8) == 0,
        "math": True,
    }
    if regime.any_sdpa_backend and regime.sdpa_backend != "auto":
        return regime.sdpa_backend
    if regime.sdpa_backend == "auto":
        return next(kernel for kernel, possible in can.items() if possible)
    return regime.sdpa_backend if can[regime.sdpa_backend] else "math"


def scaled_dot_product_attention(
    t: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rate: float,
    head_dim: int,
    *,
    broadcast: bool = False,
    causal: bool = True,
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` on ``[batch, heads, sequence, head_dim]``.

    Args:
        mask: an additive mask; None means causal, or none at all.
        rate: dropout probability on the attention weights.
        head_dim: value of the head dimension, which decides what kernels are possible.
        broadcast: whether fewer keys than queries are left to broadcasting, without ``enable_gqa``: no fused kernel
            takes them.
        causal: whether attention without a mask is causal.
    """
    value = autocast(t, value)
    key = autocast(t, key)
    query = autocast(t, query)
    grouped = key.shape[1] != query.shape[1]
    alike = query.shape[-1] == value.shape[-1] and not (grouped and broadcast)
    kernel = choose_kernel(t.regime, query, head_dim, masked=mask is not None, grouped=grouped, alike=alike)
    with t.call("", query, key, value) as local:
        if mask is not None and mask.dtype == BOOL:
            mask = local("mask", _additive_mask(t, mask, query))
        if kernel == "math":
            return _math(t, query, key, value, mask, rate, repeat=not broadcast, causal=causal)
        if kernel == "flash":
            return _flash_padded(t, query, key, value, head_dim)
        return _efficient(t, query, key, value, local("mask", _aligned(t, mask)) if mask is not None else None)


def _additive_mask(t: Trace, mask: Tensor, query: Tensor) -> Tensor:
    """`convert_boolean_attn_mask`: a mask of the query's dtype, made at every call."""
    with t.call("") as local:
        for name in ("allowed", "forbidden"):
            local(name, constant(t, "scalar_tensor.default", query, shape=()))
        return constant(t, "where.self", mask, dtype=query.dtype)


def _aligned(t: Trace, mask: Tensor) -> Tensor:
    """`pad_bias`: a padded copy where the rows are not aligned."""
    length = t.dimensions.bindings["s"]
    if length % MASK_ALIGNMENT == 0:
        return mask
    padded = t.dim("s_pad8", round_up(length, MASK_ALIGNMENT))
    return constant(t, "constant_pad_nd.default", mask, shape=(*mask.shape[:-1], (padded,)))


def _flash_padded(t: Trace, query: Tensor, key: Tensor, value: Tensor, head_dim: int) -> Tensor:
    """The flash kernel on copies padded to its head-dimension step (attention.cpp `pad_last_dim`)."""
    if head_dim % FLASH_DIM_STEP == 0:
        return _flash(t, query, key, value)
    wide = (t.dim("d_pad8", round_up(head_dim, FLASH_DIM_STEP)),)
    with t.call("") as local:
        copies = [local(f"padded{i}", pad_last(t, x, wide)) for i, x in enumerate((query, key, value))]
        out = local("out", _flash(t, *copies))
        return narrow(t, out, query.shape)


def pad_last(t: Trace, x: Tensor, last: Axis) -> Tensor:
    """``torch.nn.functional.pad`` of the last axis to `last`."""
    out = t.fresh("constant_pad_nd.default", (*x.shape[:-1], last), x.dtype)
    t.emit("constant_pad_nd.default", [x], [out], backward=_pad_backward)
    return out


def _pad_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.fresh("constant_pad_nd.default", op.inputs[0].shape, op.inputs[0].dtype)]


def _flash(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Saves q, k, v, the output, fp32 log-sum-exp per query and 24 B of random state (arXiv 2205.14135).

    The output has the layout of the queries (flash_api.cpp `mha_fwd`, ``empty_like``).
    """
    name = "_scaled_dot_product_flash_attention"
    out = t.fresh(f"{name}.default", query.shape, query.dtype, query.memory)
    logsumexp = t.fresh(f"{name}.logsumexp", query.shape[:3], FP32)
    random = [t.fresh(f"{name}.rng_state", ((2,),), UINT64), t.fresh(f"{name}.unused", (), UINT64)]
    outputs = [out, logsumexp, *random]
    inputs = [query, key, value]
    flash_dims(t, query)
    t.emit(f"{name}.default", inputs, outputs, saves=[*inputs, *outputs], backward=_flash_backward)
    return out


def flash_attention_2(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`flash_attn_func` of the flash-attn package on ``[batch, sequence, heads, head_dim]`` (arXiv 2307.08691).

    Saves what torch's own flash kernel saves, with 16 B of random state
    (flash_attn/flash_attn_interface.py `FlashAttnFunc`).
    """
    out = t.fresh("flash_attn_func", query.shape, query.dtype, query.memory if query.dense else flat(query.shape))
    batch, sequence, heads, _ = query.shape
    logsumexp = t.fresh("flash_attn_func.logsumexp", (batch, heads, sequence), FP32)
    outputs = [out, logsumexp, t.fresh("flash_attn_func.rng_state", ((2,),), UINT64)]
    inputs = [query, key, value]
    flash_dims(t, query)
    t.emit("flash_attn_func", inputs, outputs, saves=[*inputs, *outputs], backward=_flash_2_backward)
    return out


def flex_attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``flex_attention``, compiled (arXiv 2412.05496): saves q, k, v, the output and fp32 log-sum-exp per query.

    The output has the query's order in memory (torch/_inductor/kernel/flex/flex_attention.py, "strides matching the
    query"). Of the block mask, which is small, nothing is counted.
    """
    out = t.fresh("flex_attention", query.shape, query.dtype, query.memory)
    outputs = [out, t.fresh("flex_attention.logsumexp", query.shape[:3], FP32)]
    inputs = [query, key, value]
    t.emit("flex_attention", inputs, outputs, saves=[*inputs, *outputs], backward=_flex_backward)
    return out


def _flex_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    engine.workspace("delta", op.inputs[0].shape[:3], FP32)
    return _attention_backward(engine, op, gradients)


def flash_dims(t: Trace, query: Tensor, queries: Axis = ("s",)) -> None:
    """Name the rounded lengths of the backward's workspace: of the head dimension and of the `queries`."""
    sizes = t.dimensions.bindings
    head_dim = product(query.shape[3], sizes)
    block = FLASH_DIM_BLOCKS[head_dim > 128]
    t.dim(_padded_queries(queries), round_up(product(queries, sizes), FLASH_QUERY_BLOCK))
    t.dim(_padded_name(query), round_up(head_dim, block))


def _padded_name(query: Tensor) -> str:
    return "*".join(map(str, query.shape[3])) + "_pad"


def _padded_queries(queries: Axis) -> str:
    return "*".join(map(str, queries)) + "_pad128"


def _flash_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    query, key = op.inputs[:2]
    flash_workspace(engine, query, query.shape[1], key.shape[1])
    return _attention_backward(engine, op, gradients)


def _flash_2_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    query, key = op.inputs[:2]
    flash_workspace(engine, query, query.shape[2], key.shape[2])
    return _attention_backward(engine, op, gradients)


def flash_workspace(
    engine: Autograd,
    query: Tensor,
    heads: Axis,
    key_heads: Axis,
    *,
    batch: Axis | None = None,
    queries: Axis = ("s",),
    expanded: Shape | None = None,
) -> list[Tensor]:
    """Inside the kernel: fp32 accumulators, and dk and dv of every query head (flash_api.cpp `mha_bwd`).

    Args:
        batch: the batch axis where it is not the first of `query`.
        queries: the tokens of a sequence that the kernel works on.
        expanded: the shape of keys with as many heads as queries, where that is not the shape of `query`.
    """
    batch = query.shape[0] if batch is None else batch
    rows = (_padded_queries(queries),)
    made = engine.workspace("softmax_d", (batch, heads, rows), FP32)
    made += engine.workspace("dq_accum", (batch, rows, heads, (_padded_name(query),)), FP32)
    for name in ("dk_expanded", "dv_expanded") if key_heads != heads else ():
        made += engine.workspace(name, expanded or query.shape, query.dtype)
    return made


def _efficient(t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """As flash, with padded log-sum-exp and the mask among the saved (arXiv 2112.05682)."""
    name = "_scaled_dot_product_efficient_attention"
    shape = (*query.shape[:3], value.shape[-1])
    out = t.fresh(f"{name}.default", shape, query.dtype, (*shape[0], *shape[2], *shape[1], *shape[3]))
    padded = t.dim("s_pad32", round_up(t.dimensions.bindings["s"], LOGSUMEXP_ALIGNMENT))
    logsumexp = t.fresh(f"{name}.logsumexp", (*query.shape[:2], (padded,)), FP32)
    random = [t.fresh(f"{name}.philox_{part}", (), INT64) for part in ("seed", "offset")]
    inputs = [query, key, value] + ([mask] if mask is not None else [])
    recorded = [logsumexp] if any(x.requires_grad for x in inputs) else []  # `should_compute_logsumexp`
    outputs = [out, *recorded, *random]
    t.emit(f"{name}.default", inputs, outputs, saves=[*inputs, *outputs], backward=_attention_backward)
    t.graph.ops[-1].only_recorded = tuple(tensor.storage for tensor in recorded)
    return out


def _by_token(query: Tensor) -> tuple[str | int, ...]:
    """Memory order of the flash kernel's output: the query's own (``empty_like``), token by token where it has gaps."""
    batch, heads, sequence, dim = query.shape
    return query.memory if query.dense else (*batch, *sequence, *heads, *dim)


def _attention_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    results = [engine.prepare("attention_backward", x.shape, x.dtype, x.memory) for x in op.inputs[:3]]
    engine.kernel(f"{op.name.removesuffix('.default')}_backward", results)
    return [*results, *([None] * (len(op.inputs) - 3))]


def _math(
    t: Trace,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    rate: float,
    *,
    repeat: bool,
    causal: bool,
) -> Tensor:
    """`_scaled_dot_product_attention_math` (torch aten/src/ATen/native/transformers/attention.cpp).

    Low precision is computed in fp32; the scaling is split between q and k; a causal mask is built at every call.
    """
    origin = query.dtype
    with t.call("", query, key, value) as local:
        query, key, value = (local(n, to(t, x, FP32)) for n, x in (("q", query), ("k", key), ("v", value)))
        scaled = local("scaled", mul_scalar(t, query, "mul.Scalar"))
        if mask is None and causal:
            mask = local("mask", _causal_mask(t, query))
        if repeat and key.shape[1] != query.shape[1]:
            value = local("v_expanded", clone(t, value, (value.shape[0], query.shape[1], *value.shape[2:])))
            key = local("k_expanded", clone(t, key, (key.shape[0], query.shape[1], *key.shape[2:])))
        transposed = mul_scalar(t, transpose(t, key, 2, 3), "mul.Scalar")
        weights = local("weights", matmul(t, scaled, transposed, autocasts=False))
        if mask is not None:
            weights = local("weights", add(t, weights, mask))
        weights = local("weights", softmax(t, weights, name="_safe_softmax.default"))
        weights = local("weights", dropout(t, weights, rate))
        if origin != FP32:
            local("returned", constant(t, "_to_copy.default", weights, dtype=origin))
        return to(t, matmul(t, weights, value, autocasts=False), origin)


def _causal_mask(t: Trace, query: Tensor) -> Tensor:
    with t.call("") as local:
        sequence = query.shape[2]
        ones = constant(t, "ones.default", query, dtype=BOOL, shape=(sequence, sequence))
        lower = local("lower", constant(t, "tril.default", ones, dtype=BOOL))
        for name in ("allowed", "forbidden"):
            local(name, constant(t, "scalar_tensor.default", query, shape=()))
        return constant(t, "where.self", lower, dtype=query.dtype)
