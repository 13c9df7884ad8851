"""Clipping by the global norm (Pascanu et al., arXiv 1211.5063), as torch runs it.

Source: torch/nn/utils/clip_grad.py `_get_total_norm`, `_clip_grads_with_norm_`.
"""

from __future__ import annotations

from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep


def clip_gradient_norm(step: OptimizerStep) -> None:
    """One norm per gradient, all of them stacked, the total, and the coefficient; gradients are scaled in place."""
    if not step.held:
        return
    last = step.held[-1]
    norms = [step.temporary(p, "linalg_vector_norm.default", (), p.gradient.dtype) for p in step.held]
    stacked = step.temporary(last, "stack.default", (step.tensors,), last.gradient.dtype)
    total = _scalar(step, "linalg_vector_norm.default", "total_norm")
    step.free([*norms, stacked])
    shifted, inverse = (_scalar(step, op, op) for op in ("add.Tensor", "reciprocal.default"))
    coefficient = _scalar(step, "mul.Tensor", "clip_coef")
    step.free([inverse, shifted])
    clamped = _scalar(step, "clamp.default", "clip_coef_clamped")
    step.free([total, coefficient, clamped])


def _scalar(step: OptimizerStep, op: str, name: str) -> Storage:
    last = step.held[-1]
    return step.temporary(last, op, (), last.gradient.dtype, name)
