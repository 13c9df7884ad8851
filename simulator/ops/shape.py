"""Views, and the copies that appear where a view is impossible."""

from __future__ import annotations

import attrs

from hardware.dtypes import COMPLEX64, FP32
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor, flat
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]


def viewable(tensor: Tensor, shape: Shape) -> bool:
    """Whether `shape` can alias `tensor`: the dimensions of each new axis must lie next to each other in memory."""
    return tensor.contiguous or adjacent(tensor, shape)


def adjacent(tensor: Tensor, shape: Shape) -> bool:
    """Whether the dimensions of each axis of `shape`, whatever the order of axes, lie next to each other."""
    return all(_place(axis, tensor.memory) is not None for axis in shape)


def _place(axis: tuple[Dim, ...], memory: tuple[Dim, ...]) -> int | None:
    """Where in `memory` the dimensions of `axis` follow one another."""
    width = len(axis)
    return next((i for i in range(len(memory) - width + 1) if memory[i : i + width] == axis), None)


def exchanged(memory: tuple[Dim, ...], old: tuple[Dim, ...], new: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
    """`memory` with the run of dimensions `old` in it replaced by `new`; None where they do not follow one another."""
    start = _place(old, memory)
    return None if start is None else (*memory[:start], *new, *memory[start + len(old) :])


def replaced(memory: tuple[Dim, ...], axis: tuple[Dim, ...], new: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """`memory` with the dimensions `new` where those of `axis` are known to follow one another."""
    found = exchanged(memory, axis, new)
    assert found is not None
    return found


def view(t: Trace, x: Tensor, shape: Shape, name: str = "view.default") -> Tensor:
    """``x.view(shape)``."""
    out = t.view(x, shape)
    t.emit(name, [x], [out], backward=_view_backward)
    return out


def _view_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """``grad.reshape(input.shape)``: a copy where the gradient's layout does not allow a view."""
    (gradient,) = gradients
    assert gradient is not None
    shape = op.inputs[0].shape
    if viewable(gradient, shape):
        return [engine.view(gradient, shape)]
    copy = engine.fresh("clone.default", shape, gradient.dtype)
    return [engine.view(copy, shape)]


def reshape(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """``x.reshape(shape)``: a view where the layout allows it, else a copy."""
    shape = t.squeezed(shape)
    if shape == x.shape:
        return x
    if viewable(x, shape):
        return view(t, x, shape)
    return view(t, clone(t, x), shape, "_unsafe_view.default")


def permute(t: Trace, x: Tensor, *order: int) -> Tensor:
    """``x.permute(order)``: memory stays."""
    out = t.view(x, tuple(x.shape[axis] for axis in order))
    t.emit("permute.default", [x], [out], backward=_permute_backward, order=order)
    return out


def _permute_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    order = op.attributes["order"]
    return [engine.view(gradient, tuple(gradient.shape[order.index(axis)] for axis in range(len(order))))]


def rename(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """``x.view`` of the same axes, some of which are made of other dimensions (a sequence of chunks)."""
    shape = t.squeezed(shape)
    out = t.view(x, shape, _renamed(x.memory, x.shape, shape))
    return t.emit("view.default", [x], [out], backward=_rename_backward)[0]


def _renamed(memory: tuple[Dim, ...], old: Shape, new: Shape) -> tuple[Dim, ...]:
    for before, after in zip(old, new, strict=True):
        memory = memory if before == after else replaced(memory, before, after)
    return memory


def _rename_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    shape = op.inputs[0].shape
    return [engine.view(gradient, shape, _renamed(gradient.memory, gradient.shape, shape))]


def transpose(t: Trace, x: Tensor, first: int, second: int) -> Tensor:
    """``x.transpose(first, second)``: swaps two axes, memory stays."""
    out = t.view(x, _swapped(x.shape, first, second))
    t.emit("transpose.int", [x], [out], backward=_transpose_backward, axes=(first, second))
    return out


def _swapped(shape: Shape, first: int, second: int) -> Shape:
    axes = list(shape)
    axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def _transpose_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    return [engine.view(gradient, _swapped(gradient.shape, *op.attributes["axes"]))]


def clone(t: Trace, x: Tensor, shape: Shape | None = None) -> Tensor:
    """A contiguous copy; with `shape`, of an expanded view (``repeat_kv``)."""
    out = t.fresh("clone.default", shape or x.shape, x.dtype)
    t.emit("clone.default", [x], [out], backward=_clone_backward)
    return out


def _clone_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The gradient itself; an expansion is undone by the engine's sum."""
    return list(gradients)


def expand(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """``x.expand`` over the one dimension that `x` lacks: a view in which it has stride 0, outside all others."""
    new = tuple(d for d in flat(t.squeezed(shape)) if d not in x.memory)
    out = t.view(x, shape, (*new, *x.memory))
    out.dense = False
    return t.emit("expand.default", [x], [out], backward=_clone_backward)[0]


def contiguous(t: Trace, x: Tensor) -> Tensor:
    """``x.contiguous()``: `x` itself when it is."""
    return x if x.contiguous else clone(t, x)


def split_with_sizes(t: Trace, x: Tensor, shapes: list[Shape]) -> tuple[Tensor, ...]:
    """``torch.split`` into views of unlike `shapes`; backward concatenates their gradients."""
    views = [_part(t, x, shape) for shape in shapes]
    return t.emit("split_with_sizes.default", [x], views, backward=_split_backward)


def split(t: Trace, x: Tensor, shape: Shape, parts: int) -> tuple[Tensor, ...]:
    """``x.split``: `parts` views of `shape`; backward concatenates their gradients."""
    views = [_part(t, x, shape) for _ in range(parts)]
    return t.emit("split.Tensor", [x], views, backward=_split_backward)


def _part(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """A part of `x` along its last axis: the other axes lie in memory as they did."""
    (whole,), part = x.shape[-1:], t.squeezed(shape)[-1]
    place = _place(whole, x.memory)
    out = t.view(x, shape, flat(shape) if place is None else replaced(x.memory, whole, part))
    out.dense = x.dense and place == 0
    return out


def _split_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    source = op.inputs[0]
    return [engine.fresh("cat.default", source.shape, source.dtype)]


def slices(t: Trace, x: Tensor, shape: Shape, parts: int) -> list[Tensor]:
    """`parts` slices of `x`, each its own op: every slice's gradient is padded back to the whole of `x`."""
    return [narrow(t, x, shape) for _ in range(parts)]


def narrow(t: Trace, x: Tensor, shape: Shape, axis: int = -1) -> Tensor:
    """A slice of an `axis` of `x`: its gradient is padded back to the whole of `x`."""
    shape = t.squeezed(shape)
    return _cut_out(t, "slice.Tensor", x, shape, replaced(x.memory, x.shape[axis], shape[axis]))


def select(t: Trace, x: Tensor, axis: int) -> Tensor:
    """One row of an `axis`, ``x[..., i, :]`` or ``x[..., i]``: its gradient is padded back to the whole of `x`."""
    first = axis % len(x.shape)
    shape = x.shape[:first] + x.shape[first + 1 :]
    return _cut_out(t, "select.int", x, shape, replaced(x.memory, x.shape[axis], ()))


def _cut_out(t: Trace, name: str, x: Tensor, shape: Shape, memory: tuple[Dim, ...]) -> Tensor:
    out = t.view(x, shape, memory)
    out.dense = False
    return t.emit(name, [x], [out], backward=_cut_out_backward)[0]


def _cut_out_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """``slice_backward`` or ``select_backward``."""
    source = op.inputs[0]
    return [engine.fresh(f"{op.name.partition('.')[0]}_backward.default", source.shape, source.dtype)]


def cat(t: Trace, tensors: list[Tensor], shape: Shape, memory: tuple[Dim, ...]) -> Tensor:
    """``torch.cat``: backward hands out slices of the gradient."""
    out = t.fresh("cat.default", shape, tensors[0].dtype, memory)
    t.emit("cat.default", tensors, [out], backward=_cat_backward)
    return out


def _cat_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    return [engine.view(gradient, x.shape, x.memory) for x in op.inputs]


def pairs(t: Trace, first: Tensor, second: Tensor, shape: Shape) -> Tensor:
    """``torch.stack((first, second), -1).flatten(-2)``, elements of both in turn: backward takes the gradient apart."""
    out = t.fresh("stack.default", shape, first.dtype)
    t.emit("stack.default", [first, second], [out], backward=_cat_backward)
    return out


def filled(t: Trace, parts: list[Tensor], shape: Shape) -> Tensor:
    """``x.new_empty(shape)`` into whose last axis `parts` are copied one after the other (`CopySlices`)."""
    out = t.fresh("new_empty.default", shape, parts[0].dtype)
    t.emit("new_empty.default", [parts[0]], [out])
    for part in parts:
        (out,) = t.emit("copy_.default", [out, part], [t.view(out, shape)], backward=_filled_backward)
    return out


def _filled_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """A copy of the gradient with zeros where the part was written, and the part's own gradient.

    Source: torch/csrc/autograd/functions/tensor.cpp `CopySlices::apply_impl`, `CopyBackwards::apply`.
    """
    (gradient,) = gradients
    assert gradient is not None
    base, part = op.inputs
    rest = engine.like("new_empty_strided.default", gradient)
    own = engine.fresh("clone.default", part.shape, part.dtype)
    if base.requires_grad:
        engine.free(engine.fresh("zeros_like.default", part.shape, part.dtype))
    return [rest, own]


def as_complex(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """``torch.view_as_complex`` of fp32 `x`, whose last axis is pairs of real and imaginary parts."""
    out = t.view(x, shape, x.memory[:-1] + shape[-1])
    out.dtype = COMPLEX64
    return t.emit("view_as_complex.default", [x], [out], backward=_reinterpreted)[0]


def as_real(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """``torch.view_as_real`` of `x`, flattened to `shape`: fp32."""
    out = t.view(x, shape, x.memory[:-1] + shape[-1])
    out.dtype = FP32
    return t.emit("view_as_real.default", [x], [out], backward=_reinterpreted)[0]


def _reinterpreted(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    (source,) = op.inputs
    memory = gradient.memory[:-1] + source.shape[-1]
    return [attrs.evolve(gradient, shape=source.shape, memory=memory, dtype=source.dtype, is_view=True)]
