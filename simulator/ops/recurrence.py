"""What linear recurrences over chunks of a sequence are made of: convolutions, running sums, triangular systems."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.autograd import Autograd
from simulator.graph import Op, Tensor, flat
from simulator.sizes import Dim, RepeatedSize, Size
from simulator.trace import Frame, Trace

Gradients = list[Tensor | None]


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
