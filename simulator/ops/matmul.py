"""Matrix products: `mm`, `addmm`, `bmm`, and the modules made of them."""

from __future__ import annotations

from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor, flat
from simulator.ops.elementwise import autocast
from simulator.ops.shape import clone, expand, reshape, transpose, view, viewable
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]


def linear(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Axis | None = None) -> Tensor:
    """``torch.nn.functional.linear`` on ``[batch, sequence, in]`` with ``weight[out, in]``.

    Args:
        out: the dimensions that make up the last axis of the result; the weight's own by default.
    """
    if bias is not None:
        bias = autocast(t, bias)
    weight = autocast(t, weight)
    x = autocast(t, x)
    last = out or weight.shape[0]
    if t.regime.memory_efficient_linear:
        return _linear_function(t, x, weight, bias, last)
    if bias is None:
        transposed = transpose(t, weight, 0, 1)
        product = _mm(t, _flatten(t, x), transposed, last)
        return product if len(x.shape) == 2 else view(t, product, (*x.shape[:-1], last), "_unsafe_view.default")
    flat_x = _flatten(t, x)  # with a bias the input is flattened first, which decides the order of backward
    product = _addmm(t, bias, flat_x, transpose(t, weight, 0, 1), last)
    return product if len(x.shape) == 2 else view(t, product, (*x.shape[:-1], last))


def _linear_function(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None, out: Axis) -> Tensor:
    """`LinearFunctionForZeroStage3` (deepspeed/runtime/zero/linear.py): one node, a bias added in place.

    ``save_for_backward`` takes the bias, too, and packs when its forward has returned.
    """
    result = t.fresh("mm.default", (*x.shape[:-1], out), x.dtype)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    t.emit("mm.default", inputs, [result], saves=inputs, backward=_linear_function_backward)
    t.graph.ops[-1].saves_late = True
    return result


def _linear_function_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The input's gradient, the weight's, the bias's; none of them a view."""
    (gradient,) = gradients
    assert gradient is not None
    x, weight, *bias = op.inputs
    for_x = engine.fresh("mm.default", x.shape, x.dtype) if x.requires_grad else None
    for_weight = engine.fresh("mm.default", weight.shape, weight.dtype) if weight.requires_grad else None
    for_bias = [engine.fresh("sum.dim_IntList", b.shape, b.dtype) if b.requires_grad else None for b in bias]
    return [for_x, for_weight, *for_bias]


def linear_by_matmul(t: Trace, x: Tensor, weight: Tensor, out: Axis) -> Tensor:
    """``x @ weight.T``: no cached copy under autocast, because a transposed weight is no leaf."""
    transposed = autocast(t, transpose(t, weight, 0, 1))
    product = _mm(t, _flatten(t, autocast(t, x)), transposed, out)
    return view(t, product, (*x.shape[:-1], out), "_unsafe_view.default")


def addmm(t: Trace, bias: Tensor, x: Tensor, weight: Tensor, out: Axis) -> Tensor:
    """GPT-2's ``Conv1D``: ``weight[in, out]`` is not transposed (transformers pytorch_utils.py)."""
    flat = _flatten(t, x)
    weight = autocast(t, weight)
    flat = autocast(t, flat)
    bias = autocast(t, bias)
    return view(t, _addmm(t, bias, flat, weight, out), (*x.shape[:-1], out))


def _flatten(t: Trace, x: Tensor) -> Tensor:
    rows = flat(x.shape[:-1])
    return reshape(t, x, (rows, x.shape[-1]))


def _mm(t: Trace, x: Tensor, weight: Tensor, out: Axis) -> Tensor:
    result = t.fresh("mm.default", (x.shape[0], out), x.dtype)
    t.emit("mm.default", [x, weight], [result], saves=_factors(x, weight), backward=_mm_backward)
    return result


def _addmm(t: Trace, bias: Tensor, x: Tensor, weight: Tensor, out: Axis) -> Tensor:
    result = t.fresh("addmm.default", (x.shape[0], out), x.dtype)
    t.emit("addmm.default", [bias, x, weight], [result], saves=_factors(x, weight), backward=_addmm_backward)
    return result


def _factors(x: Tensor, y: Tensor) -> list[Tensor]:
    return [a for a, b in ((x, y), (y, x)) if b.requires_grad]


def _mm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The weight's gradient comes first (generated `MmBackward0`), laid out like the weight."""
    x, weight = op.inputs
    for_weight = engine.fresh("mm.default", weight.shape, weight.dtype, weight.memory) if weight.requires_grad else None
    for_x = engine.fresh("mm.default", x.shape, x.dtype) if x.requires_grad else None
    # a column-major result is a transposed view of the product, and a view is never accumulated into
    if for_weight is not None and not weight.contiguous:
        for_weight = engine.view(for_weight, weight.shape, weight.memory)
    return [for_x, for_weight]


def _addmm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    _, x, weight = op.inputs
    for_x = engine.fresh("mm.default", x.shape, x.dtype) if x.requires_grad else None
    for_weight = engine.fresh("mm.default", weight.shape, weight.dtype, weight.memory) if weight.requires_grad else None
    return [gradient, for_x, for_weight]


def matmul(t: Trace, x: Tensor, y: Tensor, *, autocasts: bool = True) -> Tensor:
    """``torch.matmul`` of batched tensors: both expand to 3-D (copied where a view will not do), then `bmm`.

    Args:
        autocasts: whether autocast, where it is on, casts both; not inside an op that it has cast for already.
    """
    if autocasts:
        y = autocast(t, y)
        x = autocast(t, x)
    with t.call("", x, y):
        if y.shape[1] != x.shape[1]:
            y = expand(t, y, (y.shape[0], x.shape[1], *y.shape[2:]))
        result = bmm(t, _to_batches(t, x), _to_batches(t, y))
        return view(t, result, (*x.shape[:-1], y.shape[-1]), "_unsafe_view.default")


def autocast_mm(t: Trace, x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` of two matrices; autocast, where it is on, casts both, the second first."""
    with t.call("") as local:
        y = local("y", autocast(t, y))
        return _mm(t, local("x", autocast(t, x)), y, y.shape[1])


def autocast_bmm(t: Trace, x: Tensor, y: Tensor) -> Tensor:
    """``torch.bmm`` as a module calls it: autocast, where it is on, casts both, the second first."""
    with t.call("") as local:
        y = local("y", autocast(t, y))
        return bmm(t, local("x", autocast(t, x)), y)


def bmm(t: Trace, x: Tensor, y: Tensor) -> Tensor:
    """``torch.bmm`` of ``[batches, n, m]`` and ``[batches, m, p]``: saves what the other factor's gradient needs."""
    result = t.fresh("bmm.default", (x.shape[0], x.shape[1], y.shape[2]), x.dtype)
    t.emit("bmm.default", [x, y], [result], saves=_factors(x, y), backward=_bmm_backward)
    return result


def _to_batches(t: Trace, x: Tensor) -> Tensor:
    shape: Shape = (flat(x.shape[:-2]), *x.shape[-2:])
    if viewable(x, shape):
        return view(t, x, shape)
    return view(t, clone(t, x), shape, "_unsafe_view.default")


def _bmm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x, y = op.inputs
    for_y = engine.fresh("bmm.default", y.shape, y.dtype) if y.requires_grad else None
    for_x = engine.fresh("bmm.default", x.shape, x.dtype) if x.requires_grad else None
    return [for_x, for_y]


def baddbmm(t: Trace, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``bias.baddbmm(x, y, alpha=...)`` with a `bias` that needs no gradient (ALiBi); autocast lowers all three."""
    bias, x, y = (autocast(t, each) for each in (bias, x, y))
    result = t.fresh("baddbmm.default", (x.shape[0], x.shape[1], y.shape[2]), x.dtype)
    t.emit("baddbmm.default", [bias, x, y], [result], saves=_factors(x, y), backward=_baddbmm_backward)
    return result


def _baddbmm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Each product is scaled by alpha (derivatives.yaml `baddbmm`)."""
    results: Gradients = [None]
    for factor in op.inputs[1:]:
        if not factor.requires_grad:
            results.append(None)
            continue
        product = engine.fresh("bmm.default", factor.shape, factor.dtype)
        results.append(engine.fresh("mul.Tensor", factor.shape, factor.dtype))
        engine.free(product)
    return results
