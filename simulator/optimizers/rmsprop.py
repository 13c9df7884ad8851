"""RMSprop (Tieleman and Hinton, Coursera lecture 6.5, 2012), centred by Graves, arXiv 1308.0850, as torch runs it.

Source: torch/optim/rmsprop.py `_init_group`, `_single_tensor_rmsprop`, `_multi_tensor_rmsprop`.
"""

from __future__ import annotations

from simulator.optimizers.gradients import copied_gradients, copy_gradient
from simulator.optimizers.step import OptimizerStep, Parameter


def rmsprop(step: OptimizerStep) -> None:
    """``torch.optim.RMSprop.step``: one to three states like the weight, and the root of the average."""
    decayed, centered = step.optimizer.weight_decay > 0, step.optimizer.centered
    for parameter in step.parameters:
        _states(step, parameter)
    if step.optimizer.implementation == "foreach":
        copies = copied_gradients(step, decayed=decayed)
        step.read_gradients(4 if centered else 3)  # _foreach_addcmul_ twice, _foreach_lerp_, _foreach_addcdiv_
        roots = step.foreach("_foreach_addcmul.Scalar" if centered else "_foreach_sqrt.default")
        step.free([*copies, *roots])
        return
    for parameter in step.parameters:
        copy_gradient(step, parameter, decayed=decayed, name_is_free=True)
        step.read_gradients(4 if centered else 3, [parameter])
        step.local("avg", step.like(parameter, "addcmul.default" if centered else "sqrt.default"))


def _states(step: OptimizerStep, parameter: Parameter) -> None:
    momentum = ("momentum_buffer",) if step.optimizer.momentum else ()
    centre = ("grad_avg",) if step.optimizer.centered else ()
    for name in ("square_avg", *momentum, *centre):
        step.state(parameter, name, parameter.dims, parameter.dtype, "zeros_like.default")
