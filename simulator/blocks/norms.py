"""Norms, in the spelling of each family."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator import ops
from simulator.graph import Tensor
from simulator.trace import Trace


def llama_rms_norm(
    t: Trace, name: str, x: Tensor, *, weight_in_fp32: bool = False, cast_weight: bool = False
) -> Tensor:
    """`LlamaRMSNorm` (models/llama/modeling_llama.py): statistics in fp32, weight applied in the input's dtype.

    Args:
        weight_in_fp32: whether the weight is applied before the cast back (`Olmo2RMSNorm`).
        cast_weight: whether it is cast to fp32 for that (`NemotronHRMSNorm`).
    """
    with t.call(name, x) as local:
        weight = t.vector("weight", x.shape[-1])
        hidden = local("hidden", ops.to(t, x, FP32))
        variance = local("variance", ops.mean(t, ops.power(t, hidden)))
        hidden = local("hidden", ops.mul(t, hidden, ops.rsqrt(t, ops.add_scalar(t, variance))))
        if weight_in_fp32:
            weight = ops.to(t, weight, FP32) if cast_weight else weight
            return ops.to(t, ops.mul(t, weight, hidden), x.dtype)
        return ops.mul(t, weight, ops.to(t, hidden, x.dtype))


def gemma_rms_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """`Gemma2RMSNorm` (models/gemma2/modeling_gemma2.py): all in fp32, weight stored minus one."""
    with t.call(name, x) as local:
        weight = t.vector("weight", x.shape[-1])
        upcast = ops.to(t, x, FP32)
        with t.call("", upcast):
            scale = ops.rsqrt(t, ops.add_scalar(t, ops.mean(t, ops.power(t, upcast))))
            normalised = ops.mul(t, upcast, scale)
        output = local("output", normalised)
        output = local("output", ops.mul(t, output, ops.add_scalar(t, ops.to(t, weight, FP32))))
        return ops.to(t, output, x.dtype)


def layer_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """An `nn.LayerNorm` over the last axis."""
    with t.call(name, x):
        return ops.layer_norm(t, x, t.parameter("weight", *x.shape[-1]), t.parameter("bias", *x.shape[-1]))


def cohere_layer_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """`Cohere2LayerNorm` (models/cohere2/modeling_cohere2.py): no bias, spelled out in fp32."""
    with t.call(name, x) as local:
        weight = t.vector("weight", x.shape[-1])
        hidden = local("hidden", ops.to(t, x, FP32))
        mean = local("mean", ops.mean(t, hidden))
        variance = local("variance", ops.mean(t, ops.power(t, ops.sub(t, hidden, mean))))
        centred = ops.sub(t, hidden, mean)
        hidden = local("hidden", ops.mul(t, centred, ops.rsqrt(t, ops.add_scalar(t, variance))))
        hidden = local("hidden", ops.mul(t, ops.to(t, weight, FP32), hidden))
        return ops.to(t, hidden, x.dtype)


def layer_norm_1p(t: Trace, name: str, x: Tensor) -> Tensor:
    """`NemotronLayerNorm1P` (models/nemotron/modeling_nemotron.py): weight stored minus one, no autocast inside."""
    with t.call(name, x) as local:
        weight, bias = (t.vector(each, x.shape[-1]) for each in ("weight", "bias"))
        arguments = [x, ops.add_scalar(t, weight), bias]
        with t.call("", arguments[1]):
            low = t.regime.autocast
            arguments = [local(f"args{i}", ops.to(t, a, low) if low else a) for i, a in enumerate(arguments)]
        return ops.layer_norm(t, *arguments, autocast=False)
