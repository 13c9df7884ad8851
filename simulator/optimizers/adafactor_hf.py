"""Adafactor (arXiv 1804.04235) as transformers runs it, which is what its Trainer's ``--optim adafactor`` uses.

Source: transformers optimization.py `Adafactor.step`, with scale_parameter=False, relative_step=False and no
first moment: statistics and update in fp32, one parameter after the other.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter


def adafactor_hf(step: OptimizerStep) -> None:
    """One step over all parameters; 16-bit gradients and weights are copied to fp32 first."""
    for parameter in step.parameters:
        if parameter.dtype != FP32:
            step.local("grad", _full(step, parameter, "grad.float"))
        _states(step, parameter)
        if parameter.dtype != FP32:
            step.local("p_data_fp32", _full(step, parameter, "data.float"))
        _update(step, parameter)


def _states(step: OptimizerStep, parameter: Parameter) -> None:
    if parameter.is_matrix:
        for name, dims in zip(("exp_avg_sq_row", "exp_avg_sq_col"), parameter.shape, strict=True):
            step.state(parameter, name, dims, FP32, "_to_copy.default")
    else:
        step.state(parameter, "exp_avg_sq", parameter.dims, FP32, "zeros_like.default")
    step.state(parameter, "RMS", (), FP32, "div.Tensor")


def _update(step: OptimizerStep, parameter: Parameter) -> None:
    squared = _full(step, parameter, "pow.Tensor_Scalar")
    update = _full(step, parameter, "add.Tensor")
    step.free([squared])
    step.local("update", update)
    factors = _factors(step, parameter)
    scaled = _full(step, parameter, "mul.Tensor")
    step.free(factors)
    step.local("update", scaled)
    step.free([_full(step, parameter, "neg.default")])


def _factors(step: OptimizerStep, parameter: Parameter) -> list[Storage]:
    """Row and column factors of the approximated second moment (`_approx_sq_grad`)."""
    if not parameter.is_matrix:
        return []
    names = ("r_factor", "c_factor")
    return [step.temporary(parameter, n, dims, FP32) for n, dims in zip(names, parameter.shape, strict=True)]


def _full(step: OptimizerStep, parameter: Parameter, op: str) -> Storage:
    return step.temporary(parameter, op, parameter.dims, FP32)
