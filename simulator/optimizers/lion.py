"""Lion (Chen et al., arXiv 2302.06675, program 1), as its authors' PyTorch code runs it.

Source: google/automl lion/lion_pytorch.py `Lion.step`.
"""

from __future__ import annotations

from simulator.optimizers.step import OptimizerStep


def lion(step: OptimizerStep) -> None:
    """One parameter after the other: a momentum like the weight, and the blend whose sign is the update."""
    for parameter in step.parameters:
        step.state(parameter, "exp_avg", parameter.dims, parameter.dtype, "zeros_like.default")
        terms = [step.like(parameter, "mul.Tensor", term) for term in ("momentum part", "gradient part")]
        update = step.like(parameter, "add.Tensor")
        step.free(terms)
        step.local("update", update)
