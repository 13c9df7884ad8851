"""What linear recurrences over chunks of a sequence are made of: convolutions, running sums, triangular systems."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor, flat
from simulator.ops.elementwise import autocast
from simulator.ops.matmul import Axis
from simulator.ops.shape import exchanged
from simulator.sizes import Dim, RepeatedSize, Size, product
from simulator.trace import Frame, Trace

Gradients = list[Tensor | None]


def conv1d(t: Trace, x: Tensor, weight: Tensor, longer: Axis) -> Tensor:
    """``F.conv1d`` of `x` ``[b, channels, s]``, a filter ``[channels, 1, kernel]`` per channel, padded to `longer`.

    Of the kernel's own copies nothing is counted.
    """
    weight, x = autocast(t, weight), autocast(t, x)
    out = t.fresh("convolution.default", (*x.shape[:2], longer), x.dtype)
    saves = [a for a, b in ((x, weight), (weight, x)) if b.requires_grad]
    t.emit("convolution.default", [x, weight], [out], saves=saves, backward=_conv1d_backward)
    return out


def _conv1d_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """One kernel makes both gradients."""
    wanted = [x for x in op.inputs if x.requires_grad]
    made = [engine.prepare("convolution_backward", x.shape, x.dtype) for x in wanted]
    engine.kernel("convolution_backward.default", made)
    results = iter(made)
    return [next(results) if x.requires_grad else None for x in op.inputs]


def pad(t: Trace, x: Tensor, axis: int, longer: Axis) -> Tensor:
    """``F.pad`` of an `axis` at its end: always a copy, contiguous but where there is nothing to add; so is backward.

    Source: torch aten/src/ATen/native/PadNd.cpp `constant_pad_nd`, which clones where no padding is positive.
    """
    shape = t.squeezed((*x.shape[:axis], longer, *x.shape[axis + 1 :]))
    sizes = t.dimensions.bindings
    same = product(shape[axis], sizes) == product(x.shape[axis], sizes)
    memory = exchanged(x.memory, x.shape[axis], shape[axis]) if same else None
    out = t.fresh("constant_pad_nd.default", shape, x.dtype, memory)
    backward = _pad_backward
    return t.emit("constant_pad_nd.default", [x], [out], backward=backward, axis=axis if same else None)[0]


def _pad_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Padding of minus as many: a clone again where there was none."""
    (gradient,) = gradients
    assert gradient is not None
    (source,), axis = op.inputs, op.attributes["axis"]
    same = None if axis is None else exchanged(gradient.memory, gradient.shape[axis], source.shape[axis])
    return [engine.fresh("constant_pad_nd.default", source.shape, source.dtype, same)]


def cumulative_sum(t: Trace, x: Tensor) -> Tensor:
    """``x.cumsum(-1)`` of fp32: backward flips, sums and flips again (torch FunctionsManual.cpp `cumsum_backward`)."""
    out = t.fresh("cumsum.default", x.shape, x.dtype)
    return t.emit("cumsum.default", [x], [out], backward=_cumulative_sum_backward)[0]


def _cumulative_sum_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (x,) = op.inputs
    kernels = ("flip.default", "cumsum.default", "flip.default")
    return [[engine.fresh(name, x.shape, x.dtype) for name in kernels][-1]]


def outer_difference(t: Trace, x: Tensor, y: Tensor, shape: Shape) -> Tensor:
    """``x - y`` of two that both broadcast to `shape`."""
    out = t.fresh("sub.Tensor", shape, x.dtype)
    return t.emit("sub.Tensor", [x, y], [out], backward=_difference_backward)[0]


def _difference_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    x, y = op.inputs
    return [gradient if x.requires_grad else None, engine.like("neg.default", gradient) if y.requires_grad else None]


def solve_triangular(t: Trace, x: Tensor, y: Tensor) -> Tensor:
    """``torch.linalg.solve_triangular(x, y)`` of ``[..., c, c]`` and ``[..., c, d]``: column-major, like LAPACK's.

    Saves `x` and its result (torch aten/src/ATen/native/BatchLinearAlgebra.cpp `linalg_solve_triangular_out`).
    """
    memory = (*flat(y.shape[:-2]), *y.shape[-1], *y.shape[-2])
    out = t.fresh("linalg_solve_triangular.default", y.shape, y.dtype, memory)
    backward = _solve_triangular_backward
    return t.emit("linalg_solve_triangular.default", [x, y], [out], saves=[x, out], backward=backward)[0]


def _solve_triangular_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Both gradients; that of `x` is a product, negated and cut to a triangle.

    Source: torch/csrc/autograd/FunctionsManual.cpp `linalg_solve_triangular_backward`.
    """
    x, y = op.inputs
    (result,) = op.outputs
    for_y = engine.fresh("linalg_solve_triangular.default", y.shape, y.dtype, result.memory)
    for_x = None
    for kernel in ("bmm.default", "neg.default", "tril.default"):
        made = engine.fresh(kernel, x.shape, x.dtype)
        if for_x is not None:
            engine.free(for_x)
        for_x = made
    return [for_x, for_y]


def crop(t: Trace, x: Tensor, axis: int, part: Axis) -> Tensor:
    """The leading `part` of an `axis` of `x` that several dimensions make up: its gradient is padded back."""
    out = _with_axis(t, x, axis, part)
    out.dense = False
    return t.emit("slice.Tensor", [x], [out], backward=_crop_backward)[0]


def _crop_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (source,) = op.inputs
    return [engine.fresh("slice_backward.default", source.shape, source.dtype)]


def renamed(t: Trace, x: Tensor, axis: int, dims: Axis) -> Tensor:
    """`x` itself, an `axis` of which gets other names for as many elements: no kernel runs."""
    return t.emit("alias", [x], [_with_axis(t, x, axis, dims)], backward=_renamed_backward, axis=axis)[0]


def _renamed_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    (source,), axis = op.inputs, op.attributes["axis"]
    memory = exchanged(gradient.memory, gradient.shape[axis], source.shape[axis]) or flat(source.shape)
    return [attrs.evolve(gradient, shape=source.shape, memory=memory)]


def _with_axis(t: Trace, x: Tensor, axis: int, dims: Axis) -> Tensor:
    shape = t.squeezed((*x.shape[:axis], dims, *x.shape[axis + 1 :]))
    return t.view(x, shape, exchanged(x.memory, x.shape[axis], shape[axis]))


def mask_rows(t: Trace, x: Tensor, mask: Tensor) -> Tensor:
    """``x * mask[:, :, None]`` with a mask of integers, which decide no element type: saves the mask."""
    out = t.fresh("mul.Tensor", x.shape, x.dtype, x.memory)
    return t.emit("mul.Tensor", [x, mask], [out], saves=[mask], backward=_mask_rows_backward)[0]


def _mask_rows_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    return [engine.like("mul.Tensor", gradient), None]


def write_row(t: Trace, whole: Tensor, row: Tensor) -> Tensor:
    """``whole[:, :, i] = row``, a copy in place (`CopySlices`): the row may have another element type."""
    out = t.view(whole, whole.shape)
    out.dense = whole.dense
    return t.emit("copy_.default", [whole, row], [out], backward=_write_row_backward)[0]


def _write_row_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """A copy of the gradient with zeros where the row was written, and the row's own gradient.

    Source: torch/csrc/autograd/functions/tensor.cpp `CopySlices::apply_impl`, `CopyBackwards::apply`.
    """
    (gradient,) = gradients
    assert gradient is not None
    whole, row = op.inputs
    rest = engine.like("new_empty_strided.default", gradient)
    own = engine.fresh("clone.default", row.shape, whole.dtype)
    if whole.requires_grad:
        engine.fresh("zeros_like.default", row.shape, whole.dtype)
    if row.dtype == whole.dtype:
        return [rest, own]
    cast = engine.like("_to_copy.default", own, row.dtype)
    engine.free(own)
    return [rest, cast]


def other_turns(t: Trace, carried: Tensor) -> tuple[Tensor, Op]:
    """Stands for turns of a loop that are not built: `carried` goes through them; see `repeat_turn`."""
    (out,) = t.emit("other turns", [carried], [t.view(carried, carried.shape)], backward=_other_turns_backward)
    op = t.graph.ops[-1]
    op.only_saved = op.saves_late = True
    return out, op


def _other_turns_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return gradients[:1]


def repeat_turn(t: Trace, others: Op, turn: Sequence[Op], count: Dim) -> None:
    """Let `others` save `count` times what is saved of the tensors that the ops of a built `turn` make."""
    saved = {storage for op in t.graph.ops for storage in op.saves}
    for storage in (storage for op in turn for storage in op.births):
        if storage in saved:
            assert isinstance(storage.size, Size)
            size = RepeatedSize(storage.size, count)
            rest = attrs.evolve(storage, label=f"{storage.label}.others", size=size)
            others.births.append(rest)
            others.saves.append(rest)


def unread(t: Trace, built: Sequence[Op], local: Frame) -> None:
    """No gradient comes back through the ops `built`: what they save goes with the names that lead to them.

    A checkpointed forward saves nothing, so there it is held for too long, but never at a step's peak.
    """
    for op in built:
        op.backward = None
        for tensor in (*op.inputs, *op.outputs):
            if tensor.storage in op.saves:
                op.saves.remove(tensor.storage)
                local.keep(tensor)
