"""Fused normalisation, and what unfused RMSNorm is made of."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor
from simulator.ops.elementwise import mul, power, rsqrt, to
from simulator.trace import Trace

Gradients = list[Tensor | None]


def layer_norm(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None, *, autocast: bool = True) -> Tensor:
    """``torch.nn.functional.layer_norm`` over the last axis: saves its input and two fp32 statistics per row.

    Args:
        autocast: whether autocast, where it is on, runs it in fp32.
    """
    if t.regime.autocast and autocast:
        x = to(t, x, FP32)
    rows = x.shape[:-1]
    out = t.fresh("native_layer_norm.default", x.shape, x.dtype)
    mean, rstd = (t.fresh(f"native_layer_norm.{name}", rows, FP32) for name in ("mean", "rstd"))
    inputs = [x, weight] if bias is None else [x, weight, bias]
    outputs = [out, mean, rstd]
    t.emit("native_layer_norm.default", inputs, outputs, saves=[*inputs, mean, rstd], backward=_layer_norm_backward)
    return out


def _layer_norm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return _masked_backward(engine, op, "native_layer_norm_backward")


def _masked_backward(engine: Autograd, op: Op, name: str) -> Gradients:
    """One kernel for the gradients of those inputs that want one (``output_mask``)."""
    results = [engine.prepare(name, x.shape, x.dtype) if x.requires_grad else None for x in op.inputs]
    engine.kernel(f"{name}.default", [result for result in results if result is not None])
    return results


def rms_norm(t: Trace, x: Tensor, weight: Tensor) -> Tensor:
    """``torch.nn.functional.rms_norm`` over the last axis: one kernel on CUDA, several where a build has none.

    Source: torch aten/src/ATen/native/layer_norm.cpp `rms_norm_symint`, `rms_norm_composite`; fused since torch 2.9,
    for a weight of the input's dtype.
    """
    if t.regime.fused_norm and t.regime.torch >= (2, 9) and x.dtype == weight.dtype:
        return _fused_rms_norm(t, x, weight)
    with t.call("") as local:
        with t.call("") as block:
            upcast = block("upcasted_input", to(t, x, FP32))
            with t.call("") as expression:
                squares = expression("pow", power(t, upcast))
                averages = expression("mean", mean(t, squares))  # epsilon is added in place
                scale = local("rqrst_input", rsqrt(t, averages))
            result = mul(t, mul(t, upcast, scale), weight)
        return to(t, result, x.dtype)


def _fused_rms_norm(t: Trace, x: Tensor, weight: Tensor) -> Tensor:
    """Saves its input and one fp32 statistic per row."""
    out = t.fresh("_fused_rms_norm.default", x.shape, x.dtype)
    rstd = t.fresh("_fused_rms_norm.rstd", _rows(x), FP32)
    saves = [x, weight, rstd]
    t.emit("_fused_rms_norm.default", [x, weight], [out, rstd], saves=saves, backward=_fused_rms_norm_backward)
    return out


def _fused_rms_norm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return _masked_backward(engine, op, "_fused_rms_norm_backward")


def mean(t: Trace, x: Tensor) -> Tensor:
    """``x.mean(-1, keepdim=True)``: backward divides an expanded gradient."""
    out = t.fresh("mean.dim", _rows(x), x.dtype)
    t.emit("mean.dim", [x], [out], backward=_mean_backward)
    return out


def mean_all(t: Trace, x: Tensor) -> Tensor:
    """``x.mean()``: backward divides an expanded gradient."""
    out = t.fresh("mean.default", (), x.dtype)
    t.emit("mean.default", [x], [out], backward=_mean_backward)
    return out


def _rows(x: Tensor) -> Shape:
    return x.shape[:-1]


def _mean_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.like("div.Scalar", op.inputs[0])]
