"""Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101), with or without AMSGrad, as torch runs them.

Source: torch/optim/adam.py `_init_group`, `_single_tensor_adam`, `_multi_tensor_adam`, `_fused_adam`.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.graph import Storage
from simulator.optimizers.gradients import copied_gradients, copy_gradient
from simulator.optimizers.step import OptimizerStep, Parameter


def adamw(step: OptimizerStep) -> None:
    """``torch.optim.AdamW.step``: weight decay scales the weights in place."""
    _adam(step, decayed_gradients=False)


def adam(step: OptimizerStep) -> None:
    """``torch.optim.Adam.step``: weight decay makes a copy of the gradients."""
    _adam(step, decayed_gradients=step.optimizer.weight_decay > 0)


def _adam(step: OptimizerStep, *, decayed_gradients: bool) -> None:
    for parameter in step.parameters:
        _states(step, parameter)
    if step.optimizer.implementation == "fused":
        step.read_gradients()
    elif step.optimizer.implementation == "foreach":
        step.free(copied_gradients(step, decayed=decayed_gradients))
        step.read_gradients()  # _foreach_lerp_
        step.read_gradients(2)  # _foreach_addcmul_
        step.free(step.foreach("_foreach_sqrt.default"))
    else:
        for parameter in step.parameters:
            _update_one(step, parameter, decayed_gradients=decayed_gradients)


def _states(step: OptimizerStep, parameter: Parameter) -> None:
    """Two moments like the weight, a third with AMSGrad; the fused kernel wants its step count on the device."""
    if step.optimizer.implementation == "fused":
        step.state(parameter, "step", (), FP32, "zeros.default")
    maximum = ("max_exp_avg_sq",) if step.optimizer.amsgrad else ()
    for moment in ("exp_avg", "exp_avg_sq", *maximum):
        step.state(parameter, moment, parameter.dims, parameter.dtype, "zeros_like.default")


def _update_one(step: OptimizerStep, parameter: Parameter, *, decayed_gradients: bool) -> None:
    copy_gradient(step, parameter, decayed=decayed_gradients)
    step.read_gradients(1, [parameter])  # lerp_
    step.read_gradients(2, [parameter])  # addcmul_
    root: Storage = step.like(parameter, "sqrt.default")
    denominator = step.like(parameter, "div.Tensor")
    step.free([root])
    step.local("denom", denominator)
