"""Lowering one micro-batch of a model chunk in Megatron-LM's pipeline: forward, loss and backward as parts."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.graph import Storage
from simulator.micro_batch import AfterForward, MicroBatch
from simulator.recorder import Recorder, Step
from simulator.roles import Phase
from simulator.runtime import Job, Runtime


@attrs.frozen(eq=False)
class ChunkForward:
    """The forward of one micro-batch through one chunk."""

    model: Sequence[Step]
    loss: Sequence[Step]
    """The loss function, called when the last stage's model has returned; else nothing."""
    after: AfterForward
    """Where backward goes on: the loop still has what the chunk returned, or the loss."""


@attrs.frozen(eq=False)
class ChunkBackward:
    """The backward of one micro-batch through one chunk."""

    steps: Sequence[Step]
    gradient: Storage | None
    """That of what the chunk received, which is left."""


class ChunkMicroBatch(MicroBatch):
    """Lowers the micro-batches of every chunk that a rank has.

    Source: megatron-core 0.16 megatron/core/pipeline_parallel/schedules.py `forward_step`, `custom_backward`.
    """

    def __init__(self, job: Job, runtimes: Sequence[Runtime]) -> None:
        super().__init__(job, runtimes)

    def forward_chunk(self, number: int) -> ChunkForward:
        """The steps of forward through the rank's chunk `number`; at an end of the model it takes the batch."""
        stage = self.graph.stages[number]
        self.recorder = self._job.recorder = Recorder()
        batch = self.graph.inputs if stage.received is None or stage.loss is not None else []
        if batch:
            self._begin()
        self.recorder.phase = Phase.FORWARD
        assert stage.output is not None
        held = {stage.output.storage, stage.loss.storage if stage.loss else None}
        border = stage.end_op if stage.loss_op is None else stage.loss_op
        self._run_ops(range(stage.first_op, border), held)
        for tensor in batch:
            self.recorder.release(tensor.storage)
        count = len(self.recorder.steps)
        self._run_ops(range(border, stage.end_op), held)
        steps = self.recorder.steps
        return ChunkForward(steps[:count], steps[count:], AfterForward(self.recorder, self._runtimes))

    def backward_chunk(self, number: int, after: AfterForward) -> ChunkBackward:
        """The steps of backward from the loss, or from the gradient that was received."""
        stage = self.graph.stages[number]
        self.recorder = self._job.recorder = after.recorder.fork()
        self._checkpoints.begin(self.recorder, self._runtimes)
        self.recorder.phase = Phase.BACKWARD
        engine = self._autograd(self._runtimes)
        if stage.loss is not None:
            engine.run(stage.loss)
        else:
            assert stage.output is not None
            engine.run_from(stage.output, stage.gradient_received())
        for storage in self._checkpoints.bound():
            self.recorder.release(storage)
        return ChunkBackward(self.recorder.steps, engine.kept[0] if engine.kept else None)
