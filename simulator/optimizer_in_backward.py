"""The optimizer's step inside backward (Lv et al., LOMO, arXiv 2306.09782): no two gradients live longer than needed.

Each parameter has an optimizer of its own, which a post-accumulate-grad hook runs; the gradient is freed there.
Source: PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward pass", and torchtune
training/memory.py `register_optim_in_bwd_hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.runtime import Job, Runtime


class OptimizerInBackward(Runtime):
    """Runs `update`, which records the step of one parameter, as soon as the parameter's gradient is there."""

    cold_differs = True

    def __init__(self, job: Job, update: Callable[[Sequence[Parameter]], OptimizerStep]) -> None:
        super().__init__(job)
        self._update = update
        self._shapes = {tensor.storage: tensor.shape for tensor in job.graph.parameters}

    def accumulated(self, parameter: Storage) -> None:
        """``optimizer_dict[parameter].step()``, then its ``zero_grad()``."""
        gradient = self.job.gradients.pop(parameter)
        for step in self._update([Parameter(parameter, gradient, self._shapes[parameter])]).steps:
            self.job.allocate(step.name, *step.births)
            self.job.free(*step.deaths)
        self.job.free(gradient)
