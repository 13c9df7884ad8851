"""Softmax over the last axis."""

from __future__ import annotations

from hardware.dtypes import FP32, DType
from simulator.graph import Tensor
from simulator.ops.elementwise import to, unary
from simulator.trace import Trace


def softmax(t: Trace, x: Tensor, dtype: DType | None = None, name: str = "_softmax.default") -> Tensor:
    """``torch.softmax``: saves its output; autocast runs it in fp32 unless an element type is given.

    Args:
        dtype: element type to compute in (``softmax(x, dtype=torch.float32)``).
    """
    target = dtype or (FP32 if t.regime.autocast else x.dtype)
    x = to(t, x, target)
    return unary(t, name, x, ("_softmax_backward_data.default",), saves="output")
