"""Dropout: the mask is one byte per element."""

from __future__ import annotations

from hardware.dtypes import BOOL
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.trace import Trace

Gradients = list[Tensor | None]


def dropout(t: Trace, x: Tensor, rate: float) -> Tensor:
    """``torch.nn.functional.dropout``: nothing at all in evaluation or at rate 0 (aten/src/ATen/native/Dropout.cpp)."""
    if rate == 0.0 or not t.regime.training:
        return x
    out = t.fresh("native_dropout.default", x.shape, x.dtype, x.memory)
    mask = t.fresh("native_dropout.mask", x.shape, BOOL, x.memory)
    t.emit("native_dropout.default", [x], [out, mask], saves=[mask], backward=_dropout_backward)
    return out


def _dropout_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    gradient = gradients[0]
    assert gradient is not None
    return [engine.like("native_dropout_backward.default", gradient)]
