"""``torch.einsum`` of two operands: permuted, batched and multiplied by `bmm`.

Source: torch aten/src/ATen/native/Linear.cpp `einsum`, `sumproduct_pair`.
"""

from __future__ import annotations

from collections.abc import Mapping

from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor, flat
from simulator.ops.elementwise import autocast
from simulator.ops.matmul import bmm
from simulator.ops.shape import adjacent
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]


def einsum(t: Trace, equation: str, x: Tensor, y: Tensor) -> Tensor:
    """``torch.einsum(equation, x, y)``, one letter per axis; some axis of both must be summed.

    The operand whose own axes come first in the result is the left factor. An axis of `y` whose dimensions another
    letter of `x` has already gets dimensions of its own, of the same sizes. Autocast lowers both operands first.
    """
    x, y = (autocast(t, operand) for operand in (x, y))
    operands, result = equation.split("->")
    first, second = operands.split(",")
    axes = dict(zip(first, x.shape, strict=True))
    for letter, axis in zip(second, y.shape, strict=True):
        if letter not in axes:
            axes[letter] = apart(t, axis) if axis and axis in axes.values() else axis
    shared = [letter for letter in result if letter in first and letter in second]
    summed = [letter for letter in first if letter in second and letter not in result]
    left, right = ([letter for letter in result if letter in own and letter not in shared] for own in (first, second))
    named = [(x, first), (y, second)]
    if _swapped(result, left, right, axes):
        left, right, named = right, left, named[::-1]
    orders = ((shared, left, summed), (shared, summed, right))
    with t.call("", x, y) as local:
        factors = []
        for (tensor, letters), order in zip(named, orders, strict=True):
            shape = tuple(_joined(group, axes) for group in order)
            factors.append(local(letters, _arranged(t, tensor, tuple(axes[letter] for letter in letters), shape)))
        product = bmm(t, *factors)
        out = t.view(product, tuple(axes[letter] for letter in result))
        return t.emit("view.default", [product], [out], backward=_arranged_backward)[0]


def apart(t: Trace, axis: Axis) -> Axis:
    """Dimensions of the same sizes under names of their own."""
    return tuple(t.dim(f"{dim}'", t.dimensions.bindings[str(dim)]) for dim in axis)


def _swapped(result: str, left: list[str], right: list[str], axes: Mapping[str, Axis]) -> bool:
    """Whether all of the right operand's axes, among which torch counts those of size 1, come before the left's."""
    own = [place for place, letter in enumerate(result) if letter in left and axes[letter]]
    other = [place for place, letter in enumerate(result) if letter in right or not axes[letter]]
    return bool(own) and bool(other) and other[-1] < own[0]


def _joined(letters: list[str], axes: Mapping[str, Axis]) -> Axis:
    return tuple(dim for letter in letters for dim in axes[letter])


def _arranged(t: Trace, x: Tensor, named: Shape, shape: Shape) -> Tensor:
    """``x.permute(...).reshape(shape)`` of `x`, whose axes are now `named`: a copy where no view will do."""
    names = dict(zip(flat(x.shape), flat(named), strict=True))
    view = t.view(x, shape, tuple(names.get(dim, dim) for dim in x.memory))
    if adjacent(view, shape):
        return t.emit("view.default", [x], [view], backward=_arranged_backward, names=names)[0]
    copy = t.fresh("clone.default", shape, x.dtype)
    return t.emit("clone.default", [x], [copy], backward=_arranged_backward, names=names)[0]


def _arranged_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The gradient in the input's order of axes, as a view where its layout allows one."""
    (gradient,) = gradients
    assert gradient is not None
    (x,) = op.inputs
    names = {new: old for old, new in op.attributes.get("names", {}).items()}
    memory = tuple(names.get(dim, dim) for dim in gradient.memory)
    view = engine.view(gradient, x.shape, memory)
    if adjacent(view, x.shape):
        return [view]
    return [engine.view(engine.fresh("clone.default", x.shape, gradient.dtype), x.shape)]
