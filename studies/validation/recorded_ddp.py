"""DDP as the oracle records it, which differs from DDP in two ways that are the recorder's own.

Its reducer never rebuilds the one bucket that DDP begins with, and that bucket, which C++ allocates before
recording begins, is seen only once an op of the first backward touches it.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.graph import Storage, Tensor
from simulator.runtime import Job, Turn
from strategies.ddp import Ddp, DdpRuntime


@attrs.frozen(kw_only=True)
class RecordedDdp(Ddp):
    """`Ddp` with the recorder's two peculiarities."""

    def start(self, job: Job) -> DdpRuntime:
        """Allocate the bucket, for the time being unseen."""
        return _RecordedRuntime(job, self)


class _RecordedRuntime(DdpRuntime):
    cold_differs = True

    def __init__(self, job: Job, options: Ddp) -> None:
        super().__init__(job, options)
        self._unseen = False
        if job.plan.pipeline is None:  # of pipelines the first step is not compared
            job.resident = [storage for storage in job.resident if storage not in self.buckets]

    def assign(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """All in one."""
        return [list(weights)]

    def begin_backward(self, turn: Turn) -> None:
        """In the first of all micro-batches the bucket has not been seen yet."""
        super().begin_backward(turn)
        self._unseen = turn.cold and turn.first

    def accumulated(self, parameter: Storage) -> None:
        """The first copy into a view shows the bucket; without views, the hook does when all gradients are there."""
        parameters = {tensor.storage for tensor in self.job.graph.parameters}
        if self._unseen and (self.options.gradient_as_bucket_view or parameters <= set(self.job.gradients)):
            self.job.recorder.slot = None
            self.job.allocate("communication hook", *self.buckets)
            self._unseen = False
        super().accumulated(parameter)
