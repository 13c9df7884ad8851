"""Fused layer normalisation, and the mean that unfused RMSNorm is made of."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor
from simulator.ops.elementwise import to
from simulator.trace import Trace

Gradients = list[Tensor | None]


def layer_norm(t: Trace, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last axis: saves its input and two fp32 statistics per row."""
    if t.regime.autocast:
        x = to(t, x, FP32)
    rows = x.shape[:-1]
    out = t.fresh("native_layer_norm.default", x.shape, x.dtype)
    mean, rstd = (t.fresh(f"native_layer_norm.{name}", rows, FP32) for name in ("mean", "rstd"))
    saves = [x, weight, bias, mean, rstd]
    t.emit(
        "native_layer_norm.default", [x, weight, bias], [out, mean, rstd], saves=saves, backward=_layer_norm_backward
    )
    return out


def _layer_norm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    results = [engine.prepare("native_layer_norm_backward", x.shape, x.dtype) for x in op.inputs]
    engine.kernel("native_layer_norm_backward.default", results)
    return list(results)


def mean(t: Trace, x: Tensor) -> Tensor:
    """``x.mean(-1, keepdim=True)``: backward divides an expanded gradient."""
    out = t.fresh("mean.dim", _rows(x), x.dtype)
    t.emit("mean.dim", [x], [out], backward=_mean_backward)
    return out


def _rows(x: Tensor) -> Shape:
    return x.shape[:-1]


def _mean_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.like("div.Scalar", op.inputs[0])]
