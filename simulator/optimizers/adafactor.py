"""Adafactor (Shazeer and Stern, arXiv 1804.04235) as torch runs it: second moments as rows and columns.

Source: torch/optim/_adafactor.py `_init_group`, `_single_tensor_adafactor`, `_multi_tensor_adafactor`.
"""

from __future__ import annotations

from collections.abc import Iterable

from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim

#: The kernel of ``Tensor.norm(2)``.
NORM = "linalg_vector_norm.default"


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
    step.state(parameter, "row_var", parameter.rows, parameter.dtype, "new_zeros.default")
    step.state(parameter, "col_var", parameter.columns, parameter.dtype, "new_zeros.default")


def _update_one(step: OptimizerStep, parameter: Parameter) -> None:
    _read_norms(step, [parameter])
    if parameter.is_matrix:
        step.local("row_mean", _part(step, parameter, NORM, parameter.rows, "row_mean"))
        step.local("col_mean", _part(step, parameter, NORM, parameter.columns, "col_mean"))
        estimate = step.like(parameter, "mm.default")
        step.free([_part(step, parameter, "mean.dim", parameter.stack)])
    else:
        step.local("grad_squared", step.like(parameter, "mul.Tensor"))
        estimate = step.like(parameter, "clone.default")
    step.local("update", estimate)
    _read_norms(step, [parameter])


def _update_all(step: OptimizerStep) -> None:
    """One group after the other, in order of appearance; the estimates of a group live until the next has its own."""
    estimates: list[Storage] = []
    for is_matrix in dict.fromkeys(parameter.is_matrix for parameter in step.parameters):
        group = [parameter for parameter in step.parameters if parameter.is_matrix is is_matrix]
        _read_norms(step, group)
        update = _estimate_matrices(step, group) if is_matrix else _estimate_vectors(step, group)
        step.free(estimates)
        estimates = update
        _read_norms(step, group)
    step.free(estimates)


def _estimate_matrices(step: OptimizerStep, matrices: list[Parameter]) -> list[Storage]:
    step.free([_part(step, p, NORM, p.rows, "row_mean") for p in matrices])
    step.free([_part(step, p, NORM, p.columns, "col_mean") for p in matrices])
    estimates = step.foreach("mm.default", matrices)
    step.free([_part(step, p, "mean.dim", p.stack) for p in matrices])
    return estimates


def _estimate_vectors(step: OptimizerStep, vectors: list[Parameter]) -> list[Storage]:
    step.free(step.foreach("_foreach_mul.List", vectors))
    return step.foreach("clone.default", vectors)


def _read_norms(step: OptimizerStep, parameters: Iterable[Parameter]) -> None:
    """A norm of each weight (or of its update) in turn, read on the host and dropped."""
    for parameter in parameters:
        step.free([_part(step, parameter, NORM, ())])


def _part(step: OptimizerStep, parameter: Parameter, op: str, dims: Iterable[Dim], name: str | None = None) -> Storage:
    """A temporary over some dimensions of `parameter`, in its dtype."""
    return step.temporary(parameter, op, dims, parameter.dtype, name)
