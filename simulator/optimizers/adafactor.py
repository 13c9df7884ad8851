"""Adafactor (Shazeer and Stern, arXiv 1804.04235) as torch runs it: second moments as rows and columns.

Source: torch/optim/_adafactor.py `_init_group`, `_single_tensor_adafactor`, `_multi_tensor_adafactor`.
"""

from __future__ import annotations

from collections.abc import Iterable

from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim


def adafactor(step: OptimizerStep) -> None:
    """``torch.optim.Adafactor.step``: matrices keep one number per row and column, vectors all of them."""
    for parameter in step.parameters:
        _states(step, parameter)
    if step.optimizer.implementation == "foreach":
        _update_all(step)
    else:
        for parameter in step.parameters:
            _update_one(step, parameter)


def _states(step: OptimizerStep, parameter: Parameter) -> None:
    if not parameter.is_matrix:
        step.state(parameter, "variance", parameter.dims, parameter.dtype, "zeros_like.default")
        return
    rows, columns = parameter.shape
    step.state(parameter, "row_var", rows, parameter.dtype, "new_zeros.default")
    step.state(parameter, "col_var", columns, parameter.dtype, "new_zeros.default")


def _update_one(step: OptimizerStep, parameter: Parameter) -> None:
    if not parameter.is_matrix:
        step.local("grad_squared", step.like(parameter, "mul.Tensor"))
        step.local("update", step.like(parameter, "clone.default"))
        return
    rows, columns = parameter.shape
    step.local("row_mean", _mean(step, parameter, "row_mean", rows))
    step.local("col_mean", _mean(step, parameter, "col_mean", columns))
    estimate = step.like(parameter, "mm.default")
    step.free([_mean(step, parameter, "mean.dim", ())])
    step.local("update", estimate)


def _mean(step: OptimizerStep, parameter: Parameter, op: str, dims: Iterable[Dim]) -> Storage:
    return step.temporary(parameter, op, dims, parameter.dtype)


def _update_all(step: OptimizerStep) -> None:
    """All matrices at once, then all vectors; the estimates of the matrices live until the vectors have theirs."""
    matrices = [p for p in step.parameters if p.is_matrix]
    vectors = [p for p in step.parameters if not p.is_matrix]
    step.free([_mean(step, p, "row_mean", p.shape[0]) for p in matrices])
    step.free([_mean(step, p, "col_mean", p.shape[1]) for p in matrices])
    estimates = step.foreach("mm.default", matrices)
    step.free([_mean(step, p, "mean.dim", ()) for p in matrices])
    step.free(step.foreach("_foreach_mul.List", vectors))
    updates = step.foreach("clone.default", vectors)
    step.free([*estimates, *updates])
