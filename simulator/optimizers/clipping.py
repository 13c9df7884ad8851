"""Clipping by the global norm (Pascanu et al., arXiv 1211.5063), as torch runs it.

Source: torch/nn/utils/clip_grad.py `_get_total_norm`, `_clip_grads_with_norm_`.
"""

from __future__ import annotations

from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter

#: What makes a partial gradient whole.
SUM = "all_reduce.default"


def clip_gradient_norm(step: OptimizerStep) -> None:
    """One norm per gradient, all of them stacked, the total, and the coefficient; gradients are scaled in place."""
    if not step.held:
        return
    summed = [step.like(p, kernel, "reduced") for p, kernel in _moved(step) if kernel == SUM]
    norms = [step.temporary(p, "linalg_vector_norm.default", (), p.gradient.dtype) for p in step.held]
    step.free(summed)
    parts = [step.temporary(p, "div.Tensor", (), p.gradient.dtype) for p, _ in _moved(step)]
    stacked = _vector(step, "stack.default")
    step.free(parts)
    roots = _reduced_norms(step)
    total = _scalar(step, "linalg_vector_norm.default", "total_norm")
    step.free([*roots, *norms, stacked])
    shifted, inverse = (_scalar(step, op, op) for op in ("add.Tensor", "reciprocal.default"))
    coefficient = _scalar(step, "mul.Tensor", "clip_coef")
    step.free([inverse, shifted])
    clamped = _scalar(step, "clamp.default", "clip_coef_clamped")
    step.free([total, coefficient, clamped])


def _moved(step: OptimizerStep) -> list[tuple[Parameter, str]]:
    """DTensors whose gradient has another placement than the weight.

    Partial ones are summed for their norm, and the norm of what every rank has becomes one part of a sum over ranks.
    """
    return [(p, p.redistribution) for p in step.held if p.redistribution is not None]


def _reduced_norms(step: OptimizerStep) -> list[Storage]:
    """Norms over all shards: squares summed over ranks (placement_types.py `_NormPartial._reduce_value`)."""
    if not any(p.distributed for p in step.held):
        return []
    squares, sums = _vector(step, "pow.Tensor_Scalar"), _vector(step, SUM)
    roots = _vector(step, "pow.Tensor_Scalar", "roots")
    step.free([squares, sums])
    return [roots]


def _vector(step: OptimizerStep, op: str, name: str | None = None) -> Storage:
    last = step.held[-1]
    return step.temporary(last, op, (step.tensors,), last.gradient.dtype, name)


def _scalar(step: OptimizerStep, op: str, name: str) -> Storage:
    last = step.held[-1]
    return step.temporary(last, op, (), last.gradient.dtype, name)
