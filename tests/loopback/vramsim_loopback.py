"""A distribution of its own, as far as Python can tell: it keeps discovery through entry points honest."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from hardware.dtypes import UINT8
from simulator.optimizers.step import OptimizerStep
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Runtime, buffer
from simulator.sizes import size_of
from strategies.options import count, option


@attrs.frozen(kw_only=True)
class Loopback:
    """Allocate `mebibytes` while the optimizer runs."""

    mebibytes: int = option(1, count(0), "how much")
    name: str = attrs.field(default="loopback", init=False)

    def __call__(self, plan: Plan) -> Plan:
        return attrs.evolve(plan, hooks=(*plan.hooks, self))

    def start(self, job: Job) -> Runtime:
        return _Runtime(job, self.mebibytes)


class _Runtime(Runtime):
    def __init__(self, job: Job, mebibytes: int) -> None:
        super().__init__(job)
        self._buffers: Sequence = [buffer("loopback", size_of((mebibytes * 2**20,), 8), UINT8, Role.BUCKET)]

    def before_step(self, step: OptimizerStep) -> None:
        for storage in self._buffers:
            step.allocate("loopback", storage)

    def after_step(self, step: OptimizerStep) -> None:
        step.free(self._buffers)
