"""Norms, in the spelling of each family."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator import ops
from simulator.graph import Tensor
from simulator.liger import NormPatch
from simulator.trace import Trace


def llama_rms_norm(
    t: Trace,
    name: str,
    x: Tensor,
    *,
    weight_in_fp32: bool = False,
    cast_weight: bool = False,
    liger: NormPatch = NormPatch.IN_PLACE,
) -> Tensor:
    """`LlamaRMSNorm` (models/llama/modeling_llama.py): statistics in fp32, weight applied in the input's dtype.

    Args:
        weight_in_fp32: whether the weight is applied before the cast back (`Olmo2RMSNorm`).
        cast_weight: whether it is cast to fp32 for that (`NemotronHRMSNorm`).
        liger: what Liger makes of this norm.
    """
    with t.call(name, x) as local:
        weight = t.vector("weight", x.shape[-1])
        if _patched(t, liger):
            return ops.liger_rms_norm(t, x, weight, in_place=liger is NormPatch.IN_PLACE)
        hidden = local("hidden", ops.to(t, x, FP32))
        variance = local("variance", ops.mean(t, ops.power(t, hidden)))
        hidden = local("hidden", ops.mul(t, hidden, ops.rsqrt(t, ops.add_scalar(t, variance))))
        if weight_in_fp32:
            weight = ops.to(t, weight, FP32) if cast_weight else weight
            return ops.to(t, ops.mul(t, weight, hidden), x.dtype)
        return ops.mul(t, weight, ops.to(t, hidden, x.dtype))


def gemma_rms_norm(t: Trace, name: str, x: Tensor, *, liger: NormPatch = NormPatch.APART) -> Tensor:
    """`Gemma2RMSNorm` (models/gemma2/modeling_gemma2.py): all in fp32, weight stored minus one.

    Args:
        liger: what Liger makes of this norm.
    """
    with t.call(name, x) as local:
        weight = t.vector("weight", x.shape[-1])
        if _patched(t, liger):
            return ops.liger_rms_norm(t, x, weight, in_place=liger is NormPatch.IN_PLACE)
        upcast = ops.to(t, x, FP32)
        with t.call("", upcast):
            scale = ops.rsqrt(t, ops.add_scalar(t, ops.mean(t, ops.power(t, upcast))))
            normalised = ops.mul(t, upcast, scale)
        output = local("output", normalised)
        output = local("output", ops.mul(t, output, ops.add_scalar(t, ops.to(t, weight, FP32))))
        return ops.to(t, output, x.dtype)


def _patched(t: Trace, liger: NormPatch) -> bool:
    return t.regime.liger.rms_norm and liger is not NormPatch.NONE


def llama4_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """`Llama4TextRMSNorm` (models/llama4/modeling_llama4.py): weight applied after the cast back."""
    with t.call(name, x) as local:
        weight = t.vector("weight", x.shape[-1])
        return ops.mul(t, local("output", unit_norm(t, x)), weight)


def unit_norm(t: Trace, x: Tensor) -> Tensor:
    """`Llama4TextL2Norm` (models/llama4/modeling_llama4.py): unit mean square in fp32, without a weight."""
    with t.call("", x) as local:
        wide = local("wide", ops.to(t, x, FP32))
        with t.call("", wide) as inner:
            scale = inner("scale", ops.rsqrt(t, ops.add_scalar(t, ops.mean(t, ops.power(t, wide)))))
            output = ops.mul(t, wide, scale)
    return ops.to(t, output, x.dtype)


def layer_norm(t: Trace, name: str, x: Tensor, *, bias: bool = True) -> Tensor:
    """An `nn.LayerNorm` over the last axis."""
    with t.call(name, x):
        weight = t.parameter("weight", *x.shape[-1])
        return ops.layer_norm(t, x, weight, t.parameter("bias", *x.shape[-1]) if bias else None)


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
