"""Norms, in the spelling of each family."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator import ops
from simulator.graph import Tensor
from simulator.trace import Trace


def llama_rms_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """`LlamaRMSNorm` (models/llama/modeling_llama.py): statistics in fp32, weight applied in the input's dtype."""
    with t.call(name, x) as local:
        weight = t.parameter("weight", *x.shape[-1])
        if t.regime.kernels.norm == "liger":
            return ops.liger_rms_norm(t, x, weight)
        hidden = local("hidden", ops.to(t, x, FP32))
        variance = local("variance", ops.mean(t, ops.power(t, hidden)))
        hidden = local("hidden", ops.mul(t, hidden, ops.rsqrt(t, ops.add_scalar(t, variance))))
        return ops.mul(t, weight, ops.to(t, hidden, x.dtype))


def gemma_rms_norm(t: Trace, name: str, x: Tensor) -> Tensor:
    """`Gemma2RMSNorm` (models/gemma2/modeling_gemma2.py): all in fp32, weight stored minus one."""
    with t.call(name, x) as local:
        weight = t.parameter("weight", *x.shape[-1])
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
