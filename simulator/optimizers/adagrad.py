"""Adagrad (Duchi et al., JMLR 12, 2011) as torch runs it: the sum of squared gradients, made with the optimizer.

Source: torch/optim/adagrad.py `__init__`, `_single_tensor_adagrad`, `_multi_tensor_adagrad`, `_fused_adagrad`.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.optimizers.gradients import copied_gradients, copy_gradient
from simulator.optimizers.step import OptimizerStep, Parameter


def adagrad(step: OptimizerStep) -> None:
    """``torch.optim.Adagrad.step``; the states are there since the constructor."""
    for parameter in step.parameters:
        _states(step, parameter)
    if step.optimizer.implementation == "fused":
        step.read_gradients()
    elif step.optimizer.implementation == "foreach":
        _update_all(step)
    else:
        for parameter in step.parameters:
            copy_gradient(step, parameter, decayed=step.optimizer.weight_decay > 0, name_is_free=True)
            step.read_gradients(3, [parameter])  # addcmul_ twice, addcdiv_
            step.local("std", step.like(parameter, "sqrt.default"))


def _states(step: OptimizerStep, parameter: Parameter) -> None:
    """The fused kernel wants its step count on the device."""
    if step.optimizer.implementation == "fused":
        step.constructed_state(parameter, "step", (), FP32)
    step.constructed_state(parameter, "sum", parameter.dims, parameter.dtype)


def _update_all(step: OptimizerStep) -> None:
    """Gradients that are copies already are scaled in place; the others by a kernel that makes copies."""
    copies = copied_gradients(step, decayed=step.optimizer.weight_decay > 0)
    step.read_gradients(2)  # _foreach_addcmul_
    roots = step.foreach("_foreach_sqrt.default")
    if not copies:
        copies = step.foreach("_foreach_mul.ScalarList")
    step.free([*copies, *roots])
