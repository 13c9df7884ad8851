"""Lowering one micro-batch of a model chunk in Megatron-LM's pipeline: forward, loss and backward as parts."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.micro_batch import AfterForward
from simulator.pipelines.stage_micro_batch import StageBackward, StageForward, StageMicroBatch
from simulator.recorder import Recorder
from simulator.roles import Phase
from simulator.runtime import Job, Runtime


class ChunkMicroBatch(StageMicroBatch):
    """Lowers the micro-batches of every chunk that a rank has.

    Source: megatron-core 0.16 megatron/core/pipeline_parallel/schedules.py `forward_step`, `custom_backward`.
    """

    def __init__(self, job: Job, runtimes: Sequence[Runtime]) -> None:
        super().__init__(job, runtimes)

    def forward_chunk(self, number: int) -> StageForward:
        """The steps of forward through the rank's chunk `number`; at an end of the model it takes the batch."""
        stage = self.graph.stages[number]
        self.recorder = self._job.recorder = Recorder()
        batch = self.graph.inputs if stage.received is None or stage.loss is not None else []
        if batch:
            self._begin()
        self.recorder.phase = Phase.FORWARD
        self._run_model(stage)
        for tensor in batch:
            self.recorder.release(tensor.storage)
        count = len(self.recorder.steps)
        self._run_loss(stage)
        steps = self.recorder.steps
        return StageForward(steps[:count], steps[count:], AfterForward(self.recorder, self._runtimes))

    def backward_chunk(self, number: int, after: AfterForward) -> StageBackward:
        """The steps of backward from the loss, or from the gradient that was received."""
        stage = self.graph.stages[number]
        self.recorder = self._job.recorder = after.recorder.fork()
        self._checkpoints.begin(self.recorder, self._runtimes)
        self.recorder.phase = Phase.BACKWARD
        engine = self._autograd(self._runtimes)
        self._run_engine(engine, stage)
        for storage in self._checkpoints.bound():
            self.recorder.release(storage)
        return self._done(engine)
