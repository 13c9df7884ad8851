"""What routes tokens to experts and back: sort, where groups end, grouped matrix products."""

from __future__ import annotations

from hardware.dtypes import FP32, INT32, INT64
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.ops.elementwise import constant, promote, to
from simulator.ops.shape import transpose
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]


def sum_last(t: Trace, x: Tensor) -> Tensor:
    """``x.sum(dim=-1, keepdim=True)``, in fp32 under autocast: backward expands its gradient."""
    out = t.fresh("sum.dim_IntList", (*x.shape[:-1], ()), FP32 if t.regime.autocast else x.dtype)
    t.emit("sum.dim_IntList", [x], [out], backward=_expand_backward)
    return out


def sum_axis(t: Trace, x: Tensor, axis: int) -> Tensor:
    """``x.sum(dim=axis)``, in fp32 under autocast: backward expands its gradient."""
    dtype = FP32 if t.regime.autocast else x.dtype
    out = t.fresh("sum.dim_IntList", (*x.shape[:axis], *x.shape[axis + 1 :]), dtype)
    t.emit("sum.dim_IntList", [x], [out], backward=_expand_backward)
    return out


def sum_all(t: Trace, x: Tensor) -> Tensor:
    """``torch.sum(x)``, in fp32 under autocast: backward expands its gradient."""
    out = t.fresh("sum.default", (), FP32 if t.regime.autocast else x.dtype)
    return t.emit("sum.default", [x], [out], backward=_expand_backward)[0]


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
    t.graph.ops[-1].only_recorded = (original.storage,)
    out = t.view(x, x.shape)
    t.emit("div_.Tensor", [x, divisor, original], [out], saves=[original, divisor], backward=_divide_backward)
    t.drop(original)
    return out


def _divide_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The divisor's gradient, ``-grad * ((x / divisor) / divisor)``, comes first (`div_tensor_other_grad`)."""
    (gradient,) = gradients
    assert gradient is not None
    wide = promote(gradient, op.inputs[1])
    if not op.inputs[1].requires_grad:
        return [engine.like("div.Tensor", gradient, wide), None, None]
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


def grouped_linear(t: Trace, x: Tensor, weight: Tensor, ends: Tensor, *, transposed: bool = False) -> Tensor:
    """``torch._grouped_mm`` of rows sorted by group and ``weight[groups, out, in]``.

    ``torch.autocast`` does not know it: rows are cast to the weight's element type
    (transformers integrations/moe.py `_grouped_linear`).

    Args:
        x: ``[rows, in]``.
        ends: row at which each group ends, saved.
        transposed: whether the weight is ``[groups, in, out]``.
    """
    factor = weight if transposed else transpose(t, weight, 1, 2)
    with t.call("") as local:
        rows = local("input", to(t, x, weight.dtype)) if x.dtype != weight.dtype else x
        result = t.fresh("_grouped_mm.default", (rows.shape[0], factor.shape[2]), rows.dtype)
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
