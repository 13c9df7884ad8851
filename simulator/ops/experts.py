"""What routes tokens to experts and back: top-k, sort, row look-up, grouped matrix products."""

from __future__ import annotations

from hardware.dtypes import FP32, INT32, INT64
from simulator.autograd import Autograd
from simulator.graph import BackwardRule, Op, Tensor
from simulator.ops.elementwise import constant, promote, to
from simulator.ops.shape import transpose
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]


def top_k(t: Trace, x: Tensor, kept: Axis) -> tuple[Tensor, Tensor]:
    """``torch.topk`` over the last axis: `kept` values and their int64 indices, which are saved."""
    shape = (*x.shape[:-1], kept)
    values, indices = t.fresh("topk.values", shape, x.dtype), t.fresh("topk.indices", shape, INT64)
    t.emit("topk.default", [x], [values, indices], saves=[indices], backward=_scatter("scatter.src"), **_subclasses(t))
    return values, indices


def top_k_constant(t: Trace, x: Tensor, kept: Axis) -> tuple[Tensor, Tensor]:
    """``torch.topk`` for its indices alone: no gradient flows through the values."""
    shape = (*x.shape[:-1], kept)
    outputs = [t.fresh("topk.values", shape, x.dtype), t.fresh("topk.indices", shape, INT64)]
    values, indices = t.emit("topk.default", [x], outputs)
    return values, indices


def gather(t: Trace, x: Tensor, indices: Tensor) -> Tensor:
    """``x.gather(1, indices)``."""
    out = t.fresh("gather.default", indices.shape, x.dtype)
    backward = _scatter("scatter_add.default")
    t.emit("gather.default", [x, indices], [out], saves=[indices], backward=backward, **_subclasses(t))
    return out


def _subclasses(t: Trace) -> dict[str, bool]:
    return {"subclasses": t.regime.tensor_subclasses}


def _scatter(kernel: str) -> BackwardRule:
    """Zeros like the input, into which the gradient is scattered; tensor subclasses get a copy of them.

    Source: torch/csrc/autograd/FunctionsManual.cpp `value_selecting_reduction_backward`, `gather_backward`,
    `index_backward`.
    """

    def backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
        source = op.inputs[0]
        result = engine.fresh("new_zeros.default", source.shape, source.dtype)
        if op.attributes["subclasses"]:
            result = engine.fresh(kernel, source.shape, source.dtype)
        return [result, *[None] * (len(op.inputs) - 1)]

    return backward


def sum_last(t: Trace, x: Tensor) -> Tensor:
    """``x.sum(dim=-1, keepdim=True)``, in fp32 under autocast: backward expands its gradient."""
    out = t.fresh("sum.dim_IntList", (*x.shape[:-1], ()), FP32 if t.regime.autocast else x.dtype)
    t.emit("sum.dim_IntList", [x], [out], backward=_expand_backward)
    return out


def sum_axis(t: Trace, x: Tensor, axis: int) -> Tensor:
    """``x.sum(dim=axis)``: backward expands its gradient."""
    out = t.fresh("sum.dim_IntList", (*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype)
    t.emit("sum.dim_IntList", [x], [out], backward=_expand_backward)
    return out


def _expand_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """A view in which the summed axis has stride 0, outside all others."""
    (gradient,) = gradients
    assert gradient is not None
    (x,) = op.inputs
    new = tuple(dim for dim in x.dims if dim not in gradient.memory)
    return [engine.view(gradient, x.shape, (*new, *gradient.memory))]


def divide_in_place(t: Trace, x: Tensor, divisor: Tensor) -> Tensor:
    """``x /= divisor``: autograd saves a copy of `x` as it was."""
    if not x.requires_grad:
        out = t.view(x, x.shape)
        return t.emit("div_.Tensor", [x, divisor], [out])[0]
    original = constant(t, "clone.default", x)
    out = t.view(x, x.shape)
    t.emit("div_.Tensor", [x, divisor, original], [out], saves=[original, divisor], backward=_divide_backward)
    t.drop(original)
    return out


def _divide_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The divisor's gradient, ``-grad * ((x / divisor) / divisor)``, comes first (`div_tensor_other_grad`)."""
    (gradient,) = gradients
    assert gradient is not None
    wide = promote(gradient, op.inputs[1])
    factors = [engine.like("div.Tensor", gradient, wide) for _ in range(2)]
    factors.append(engine.like("neg.default", gradient))
    for_divisor = engine.like("mul.Tensor", gradient, wide)
    engine.free(*factors)
    return [engine.like("div.Tensor", gradient, wide), for_divisor, None]


def sort(t: Trace, x: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.sort`` of integers: sorted values and int64 indices."""
    outputs = [t.fresh("sort.values", x.shape, x.dtype), t.fresh("sort.indices", x.shape, INT64)]
    values, indices = t.emit("sort.default", [x], outputs)
    return values, indices


def index(t: Trace, x: Tensor, indices: Tensor) -> Tensor:
    """``x[indices]``, rows of `x` for a vector of `indices`, which are saved."""
    out = t.fresh("index.Tensor", (*indices.shape, *x.shape[1:]), x.dtype)
    backward = _scatter("index_put.default")
    t.emit("index.Tensor", [x, indices], [out], saves=[indices], backward=backward, **_subclasses(t))
    return out


def inverse_permutation(t: Trace, permutation: Tensor) -> Tensor:
    """``inverse[permutation] = torch.arange(n)`` on an empty tensor."""
    inverse = constant(t, "empty_like.default", permutation)
    with t.call("") as local:
        positions = local("positions", constant(t, "arange.default", permutation))
        return t.emit("index_put_.default", [inverse, permutation, positions], [t.view(inverse, inverse.shape)])[0]


def group_ends(t: Trace, ids: Tensor, groups: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Where each of `groups` ends among sorted `ids`: the int32 ids, how many there are of each, their running sum."""
    low = constant(t, "_to_copy.default", ids, dtype=INT32)
    counts = constant(t, "histc.default", low, shape=(groups,))
    return low, counts, constant(t, "cumsum.default", counts)


def grouped_linear(t: Trace, x: Tensor, weight: Tensor, ends: Tensor, out: Axis, *, transposed: bool = False) -> Tensor:
    """``torch._grouped_mm`` of rows sorted by group and ``weight[groups, out, in]``.

    ``torch.autocast`` does not know it: rows are cast to the weight's element type
    (transformers integrations/moe.py `_grouped_linear`).

    Args:
        x: ``[rows, in]``.
        ends: row at which each group ends, saved.
        out: dimensions of the last axis of the result.
        transposed: whether the weight is ``[groups, in, out]``.
    """
    factor = weight if transposed else transpose(t, weight, 1, 2)
    with t.call("") as local:
        rows = local("input", to(t, x, weight.dtype)) if x.dtype != weight.dtype else x
        result = t.fresh("_grouped_mm.default", (rows.shape[0], out), rows.dtype)
        saves = [a for a, b in ((rows, factor), (factor, rows)) if b.requires_grad]
        inputs = [rows, factor, ends]
        t.emit("_grouped_mm.default", inputs, [result], saves=[*saves, ends], backward=_grouped_mm_backward)
    return result


def _grouped_mm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The weight's gradient comes first, laid out like the weight (`_grouped_mm_mat2_backward`)."""
    rows, factor, _ = op.inputs

    def product(x: Tensor) -> Tensor | None:
        return engine.fresh("_grouped_mm.default", x.shape, x.dtype, x.memory) if x.requires_grad else None

    for_weight = product(factor)
    if for_weight is not None and not factor.contiguous:
        for_weight = engine.view(for_weight, factor.shape, factor.memory)
    return [product(rows), for_weight, None]
