"""Clipping by the global norm (Pascanu et al., arXiv 1211.5063): torch/nn/utils/clip_grad.py `clip_grad_norm_`."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.optimizers.step import OptimizerStep


def clip_gradient_norm(step: OptimizerStep) -> None:
    """One norm per gradient, all of them stacked, the total, and the coefficient; gradients are scaled in place."""
    if not step.parameters:
        return
    last = step.parameters[-1]
    norms = [step.temporary(p, "linalg_vector_norm.default", (), p.gradient.dtype) for p in step.parameters]
    stacked = step.temporary(last, "stack.default", (step.tensors,), last.gradient.dtype)
    total = step.temporary(last, "linalg_vector_norm.total", (), FP32)
    step.free([*norms, stacked])
    coefficient = [step.temporary(last, f"clip_coefficient.{i}", (), FP32) for i in range(2)]
    step.free([total, *coefficient])
