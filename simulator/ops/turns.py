"""Loops over blocks of a sequence, whose turns each leave a part of the result in a Python list."""

from __future__ import annotations

import attrs

from simulator.autograd import Autograd
from simulator.graph import Op, Tensor, flat
from simulator.ops.matmul import Axis
from simulator.ops.shape import exchanged, narrow
from simulator.sizes import Dim, RepeatedSize, Size
from simulator.trace import Trace

Gradients = list[Tensor | None]


def listed(t: Trace, part: Tensor, count: Dim) -> Tensor:
    """What `count` turns that are not built left in a list, each a tensor like `part`: no gradient is followed."""
    out = t.fresh("other parts", part.shape, part.dtype, part.memory)
    assert isinstance(out.storage.size, Size)
    out.storage.size = RepeatedSize(out.storage.size, count)
    return t.emit("other parts", [], [out])[0]


def block(t: Trace, x: Tensor, rows: Axis, axis: int) -> Tensor:
    """The part of an `axis` of `x` that a turn works on; around one of a single row lies the rest of that axis."""
    out = narrow(t, x, (*x.shape[:axis], rows, *x.shape[axis + 1 :]), axis)
    if not out.shape[axis]:
        out.memory = x.memory
    return out


def joined(t: Trace, parts: list[Tensor], axis: int, whole: Axis) -> Tensor:
    """``torch.cat(parts, axis)``: backward hands out slices of the gradient, wherever that lies in memory.

    Args:
        whole: the dimensions that make up `axis` of the result.
    """
    first = parts[0]
    shape = t.squeezed((*first.shape[:axis], whole, *first.shape[axis + 1 :]))
    out = t.fresh("cat.default", shape, first.dtype, flat(shape))
    return t.emit("cat.default", parts, [out], backward=_joined_backward, axis=axis)[0]


def _joined_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    return [_sliced(gradient, part, op.attributes["axis"]) for part in op.inputs]


def _sliced(gradient: Tensor, part: Tensor, axis: int) -> Tensor:
    """The slice of `gradient` that belongs to `part`; all of it where it is the only one."""
    old, new = gradient.shape[axis], part.shape[axis]
    memory = exchanged(gradient.memory, old, new) if new else gradient.memory
    assert memory is not None
    return attrs.evolve(gradient, shape=part.shape, memory=memory, is_view=True, dense=old == new)
