"""Adafactor (arXiv 1804.04235) as transformers runs it, which is what its Trainer's ``--optim adafactor`` uses.

Source: transformers optimization.py `Adafactor.step`, with scale_parameter=False, relative_step=False and no
first moment: statistics and update in fp32, one parameter after the other.
"""

from __future__ import annotations

from collections.abc import Iterable

from hardware.dtypes import FP32
from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim


def adafactor_hf(step: OptimizerStep) -> None:
    """One step over all parameters; 16-bit gradients and weights are copied to fp32 first."""
    for parameter in step.parameters:
        _copy(step, parameter, "grad")
        _states(step, parameter)
        _copy(step, parameter, "p_data_fp32")
        _weight_rms(step, parameter)
        _update(step, parameter)


def _copy(step: OptimizerStep, parameter: Parameter, name: str) -> None:
    """An fp32 copy in local `name`, which is bound to the 16-bit tensor first: the last parameter's copy is gone."""
    step.local(name, None)
    if parameter.dtype != FP32:
        step.local(name, _part(step, parameter, "_to_copy.default", parameter.dims, name))


def _states(step: OptimizerStep, parameter: Parameter) -> None:
    if parameter.is_matrix:
        step.state(parameter, "exp_avg_sq_row", parameter.rows, FP32, "_to_copy.default")
        step.state(parameter, "exp_avg_sq_col", parameter.columns, FP32, "_to_copy.default")
    else:
        step.state(parameter, "exp_avg_sq", parameter.dims, FP32, "zeros_like.default")


def _weight_rms(step: OptimizerStep, parameter: Parameter) -> None:
    """The weight's root mean square, a state that every step makes anew."""
    norm = _part(step, parameter, "linalg_vector_norm.default", ())
    old = step.renewed_state(parameter, "RMS", (), FP32, "div.Tensor")
    step.free([norm, *old])


def _update(step: OptimizerStep, parameter: Parameter) -> None:
    """The last parameter's update lives until this one's squared gradient has replaced it."""
    squared = _full(step, parameter, "pow.Tensor_Scalar")
    shifted = _full(step, parameter, "add.Tensor")
    step.free([squared])
    step.local("update", shifted)
    update = _factored(step, parameter) if parameter.is_matrix else _full(step, parameter, "rsqrt.default")
    step.local("update", update)
    _clip(step, parameter)
    step.free([_full(step, parameter, "neg.default")])


def _factored(step: OptimizerStep, parameter: Parameter) -> Storage:
    """Means over columns and rows, then the update from both factors (`_approx_sq_grad`)."""
    step.free([_part(step, parameter, "mean.dim", parameter.rows, "row_mean")])
    step.free([_part(step, parameter, "mean.dim", parameter.columns, "col_mean")])
    mean = _part(step, parameter, "mean.dim", parameter.stack)
    rows = _part(step, parameter, "div.Tensor", parameter.rows, "r_factor")
    step.free([mean])
    columns = _part(step, parameter, "rsqrt.default", parameter.columns, "c_factor")
    update = _full(step, parameter, "mul.Tensor")
    step.free([rows, columns])
    return update


def _clip(step: OptimizerStep, parameter: Parameter) -> None:
    """The update's root mean square over the threshold, which scales it in place."""
    norm = _part(step, parameter, "linalg_vector_norm.default", (), "update_norm")
    rms = _part(step, parameter, "div.Tensor", (), "update_rms")
    step.free([norm])
    ratio = _part(step, parameter, "div.Tensor", (), "update_ratio")
    step.free([rms])
    step.free([ratio])


def _full(step: OptimizerStep, parameter: Parameter, op: str) -> Storage:
    return _part(step, parameter, op, parameter.dims)


def _part(step: OptimizerStep, parameter: Parameter, op: str, dims: Iterable[Dim], name: str | None = None) -> Storage:
    """An fp32 temporary over some dimensions of `parameter`."""
    return step.temporary(parameter, op, dims, FP32, name)
