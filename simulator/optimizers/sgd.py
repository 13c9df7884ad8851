"""Stochastic gradient descent with momentum (Sutskever et al., ICML 2013), as torch runs it.

Source: torch/optim/sgd.py `_single_tensor_sgd`, `_multi_tensor_sgd`, `_fused_sgd`.
"""

from __future__ import annotations

from simulator.optimizers.gradients import copied_gradients, copy_gradient
from simulator.optimizers.step import OptimizerStep, Parameter


def sgd(step: OptimizerStep) -> None:
    """``torch.optim.SGD.step``: a momentum buffer per parameter, a copy of the gradients with weight decay."""
    implementation = step.optimizer.implementation
    if implementation == "for-loop":
        for parameter in step.parameters:
            _update_one(step, parameter)
        return
    foreach = implementation == "foreach"
    copies = copied_gradients(step, decayed=step.optimizer.weight_decay > 0) if foreach else []
    for parameter in step.parameters:
        _momentum(step, parameter, "clone.default" if foreach else "empty_like.default")
    step.free(copies)
    step.read_gradients()  # _foreach_add_


def _update_one(step: OptimizerStep, parameter: Parameter) -> None:
    copy_gradient(step, parameter, decayed=step.optimizer.weight_decay > 0)
    _momentum(step, parameter, "clone.default")
    if step.optimizer.nesterov:
        step.local("grad", step.like(parameter, "add.Tensor", "nesterov"))
    elif step.optimizer.momentum:
        step.local("grad", None)  # the name is bound to the buffer
    step.read_gradients(1, [parameter])  # add_


def _momentum(step: OptimizerStep, parameter: Parameter, op: str) -> None:
    if step.optimizer.momentum:
        step.state(parameter, "momentum_buffer", parameter.dims, parameter.dtype, op)
