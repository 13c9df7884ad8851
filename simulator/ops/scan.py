"""What scans over a sequence in chunks are made of: running sums, masks, padding, a short convolution."""

from __future__ import annotations

from hardware.dtypes import BOOL
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor
from simulator.ops.elementwise import autocast, constant, suggested_memory, wide
from simulator.ops.shape import exchanged, replaced
from simulator.sizes import Dim, product
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]


def cumsum(t: Trace, x: Tensor, axis: int) -> Tensor:
    """``torch.cumsum`` along `axis`, in fp32 under autocast; its result is contiguous."""
    x = wide(t, x)
    out = t.fresh("cumsum.default", x.shape, x.dtype)
    return t.emit("cumsum.default", [x], [out], backward=_cumsum_backward, axis=axis)[0]


def _cumsum_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The running sum from the end; nothing to do along an axis of 1 (FunctionsManual.cpp `cumsum_backward`)."""
    (gradient,) = gradients
    assert gradient is not None
    (x,) = op.inputs
    if not x.shape[op.attributes["axis"]]:
        return [gradient]
    engine.like("flip.default", gradient)
    for name in ("cumsum.default", "flip.default"):
        gradient = engine.fresh(name, x.shape, gradient.dtype)
    return [gradient]


def pad(t: Trace, x: Tensor, axis: int, longer: Axis) -> Tensor:
    """``torch.nn.functional.pad`` of an `axis` at its end: a copy even where there is nothing to add.

    Source: torch aten/src/ATen/native/PadNd.cpp `constant_pad_nd`, which clones where no padding is positive.
    """
    shape = t.squeezed((*x.shape[:axis], longer, *x.shape[axis + 1 :]))
    sizes = t.dimensions.bindings
    same = product(shape[axis], sizes) == product(x.shape[axis], sizes)
    memory = exchanged(x.memory, x.shape[axis], shape[axis]) if same else suggested_memory(x, shape)
    out = t.fresh("constant_pad_nd.default", shape, x.dtype, memory)
    return t.emit("constant_pad_nd.default", [x], [out], backward=_pad_backward, axis=axis)[0]


def _pad_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """A copy without the padding, in the layout of the gradient (`constant_pad_nd_backward`)."""
    (gradient,) = gradients
    assert gradient is not None
    (x,), axis = op.inputs, op.attributes["axis"]
    memory = exchanged(gradient.memory, gradient.shape[axis], x.shape[axis])
    return [engine.fresh("constant_pad_nd.default", x.shape, gradient.dtype, memory)]


def after_zeros(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """``torch.cat([zeros, x], dim=1)`` of `shape`, the zeros in the frame of the caller."""
    out = t.fresh("cat.default", shape, x.dtype)
    return t.emit("cat.default", [x], [out], backward=_after_zeros_backward)[0]


def _after_zeros_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """A slice of the gradient: what comes before the axis is no neighbour of it any more, as the 1 says."""
    (gradient,) = gradients
    assert gradient is not None
    (x,) = op.inputs
    before, axis = gradient.shape[:2]
    gap = (1,) if before else ()
    return [engine.view(gradient, x.shape, replaced(gradient.memory, axis, (*gap, *x.shape[1])))]


def convolution(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None, length: tuple[Dim, ...]) -> Tensor:
    """``torch.nn.functional.conv1d`` with a filter per channel, on ``[batch, channels, sequence]``.

    Of the kernel's own copies nothing is counted.

    Args:
        length: dimensions of the last axis of the result.
    """
    bias = None if bias is None else autocast(t, bias)
    weight = autocast(t, weight)
    x = autocast(t, x)
    out = t.fresh("convolution.default", (*x.shape[:-1], length), x.dtype)
    inputs = [x, weight] if bias is None else [x, weight, bias]
    saves = [a for a, b in ((x, weight), (weight, x)) if b.requires_grad]
    return t.emit("convolution.default", inputs, [out], saves=saves, backward=_convolution_backward)[0]


def _convolution_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """All gradients by one kernel."""
    wanted = [x if x.requires_grad else None for x in op.inputs]
    results = [x and engine.prepare("convolution_backward", x.shape, x.dtype) for x in wanted]
    engine.kernel("convolution_backward.default", [result for result in results if result is not None])
    return list(results)


def lower_triangle(t: Trace, like: Tensor, rows: tuple[Dim, ...], columns: tuple[Dim, ...]) -> Tensor:
    """``torch.tril(torch.ones(rows, columns, dtype=torch.bool))``."""
    with t.call("") as local:
        local("ones", constant(t, "ones.default", like, dtype=BOOL, shape=(rows, columns)))
        return constant(t, "tril.default", like, dtype=BOOL, shape=(rows, columns))
