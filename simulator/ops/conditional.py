"""Elementwise ops that keep an element or replace it: their gradients are zero where they replaced it."""

from __future__ import annotations

from hardware.dtypes import BOOL
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.trace import Trace

Gradients = list[Tensor | None]


def where(t: Trace, condition: Tensor, x: Tensor, value: Tensor) -> Tensor:
    """``torch.where(condition, x, value)`` with a `value` of no dimension that needs no gradient."""
    out = t.fresh("where.self", x.shape, x.dtype)
    t.emit("where.self", [condition, x, value], [out], saves=[condition], backward=_where_backward)
    return out


def _where_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """``where(condition, grad, 0)``: the zero is a tensor on the device (derivatives.yaml `where.self`)."""
    (gradient,) = gradients
    assert gradient is not None
    engine.fresh("scalar_tensor.default", (), gradient.dtype)
    return [None, engine.like("where.self", gradient), None]


def masked_fill(t: Trace, x: Tensor, mask: Tensor) -> Tensor:
    """``x.masked_fill(mask, number)``: a contiguous copy, whatever the layout; saves the mask."""
    out = t.fresh("masked_fill.Scalar", x.shape, x.dtype)
    t.emit("masked_fill.Scalar", [x, mask], [out], saves=[mask], backward=_masked_fill_backward)
    return out


def _masked_fill_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x, _ = op.inputs
    return [engine.fresh("masked_fill.Scalar", x.shape, x.dtype), None]


def clamp(t: Trace, x: Tensor, *, bounds: int = 2) -> Tensor:
    """``torch.clamp`` between `bounds` numbers, 2 or the upper one alone: its input says where the gradient passes."""
    out = t.fresh("clamp.default", x.shape, x.dtype, x.memory)
    t.emit("clamp.default", [x], [out], saves=[x], backward=_clamp_backward, bounds=bounds)
    return out


def _clamp_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """A comparison per bound, and a choice by them (torch/csrc/autograd/FunctionsManual.cpp `clamp_backward`)."""
    (gradient,) = gradients
    assert gradient is not None
    engine.fresh("scalar_tensor.default", (), gradient.dtype)
    for name in ("ge.Scalar", "le.Scalar")[-op.attributes["bounds"] :]:
        engine.like(name, op.inputs[0], BOOL)
    return [engine.like("where.self", gradient)]
