"""The copies of gradients that torch's optimizers work on: negated by `maximize`, with the decayed weights added.

Source: torch/optim/adam.py, sgd.py, adagrad.py, rmsprop.py, the first lines of their `_single_tensor_*` and
`_multi_tensor_*`.
"""

from __future__ import annotations

from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter


def copied_gradients(step: OptimizerStep, *, decayed: bool) -> list[Storage]:
    """Copies of all gradients at once, to be freed by the caller; weight decay is added to negated ones in place."""
    if step.optimizer.maximize:
        return step.foreach("_foreach_neg.default")
    return step.foreach("_foreach_add.List") if decayed else []


def copy_gradient(step: OptimizerStep, parameter: Parameter, *, decayed: bool, name_is_free: bool = False) -> None:
    """One gradient's copies in local ``grad``, which the loop binds to the gradient itself first.

    `name_is_free` says that it does so before negating, so that the last parameter's copy is gone by then.
    """
    if name_is_free or not step.optimizer.maximize:
        step.local("grad", None)
    if step.optimizer.maximize:
        step.local("grad", step.like(parameter, "neg.default"))
    if decayed:
        step.local("grad", step.like(parameter, "add.Tensor"))
