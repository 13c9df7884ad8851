"""Lowering one micro-batch of a pipeline stage: forward, loss and backward as parts that a schedule puts in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import attrs

from hardware.errors import UnsupportedError
from simulator.autograd import Autograd
from simulator.graph import Op, Storage, Tensor
from simulator.micro_batch import AfterForward, MicroBatch
from simulator.recorder import Recorder, Step
from simulator.roles import Phase
from simulator.runtime import Job
from simulator.split_backward import InputBackward, Split, WeightBackward

Part = TypeVar("Part", InputBackward, WeightBackward)


@attrs.frozen(eq=False)
class StageForward:
    """The forward of one micro-batch through one stage."""

    model: Sequence[Step]
    loss: Sequence[Step]
    """The loss function, which the schedule calls when the last stage has returned; else nothing."""
    after: AfterForward
    """Where backward goes on: the schedule still has the stage's output, and the loss."""


@attrs.frozen(eq=False)
class StageBackward:
    """The backward of one micro-batch through one stage; the stage's output and the loss are still there."""

    steps: Sequence[Step]
    gradient: Storage | None
    """That of what the stage received, which is left."""
    after: AfterForward
    """Where the second part of a backward that is split goes on."""
    captured: dict[Op, list[Tensor | None]] = attrs.field(factory=dict)
    """The gradients that the first part keeps for the second."""


class StageMicroBatch(MicroBatch):
    """Lowers the micro-batches of every stage that a rank has.

    Source: torch 2.13 torch/distributed/pipelining/stage.py `forward_one_chunk`, `backward_one_chunk`.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)

    def forward_stage(self, number: int) -> StageForward:
        """The steps of forward through the rank's stage `number`."""
        stage = self.graph.stages[number]
        self.recorder = self._job.recorder = Recorder()
        self.recorder.phase = Phase.FORWARD
        assert stage.output is not None
        held = {stage.output.storage, stage.loss.storage if stage.loss else None}
        border = stage.end_op if stage.loss_op is None else stage.loss_op
        self._run_ops(range(stage.first_op, border), held)
        count = len(self.recorder.steps)
        self._run_ops(range(border, stage.end_op), held)
        steps = self.recorder.steps
        return StageForward(steps[:count], steps[count:], AfterForward(self.recorder, ()))

    def backward_stage(self, number: int, after: AfterForward) -> StageBackward:
        """The steps of a full backward (`stage_backward`), from the loss or from the gradient that was received."""
        self._go_on(after)
        engine = self._autograd(())
        self._run_engine(engine, number)
        for storage in self._checkpoints.bound():
            self.recorder.release(storage)
        return self._done(engine)

    def backward_input(self, number: int, after: AfterForward) -> StageBackward:
        """The steps of `stage_backward_input`."""
        if self._checkpoints.region_of:
            raise UnsupportedError("checkpoints in a backward split in two are not modelled: take another schedule")
        self._go_on(after)
        engine = self._split_engine(InputBackward, number)
        self._run_engine(engine, number)
        engine.finish()
        return attrs.evolve(self._done(engine), captured=engine.captured)

    def backward_weight(self, number: int, first: StageBackward) -> StageBackward:
        """The steps of `stage_backward_weight`, after the `first` part."""
        self._go_on(first.after)
        engine = self._split_engine(WeightBackward, number)
        engine.run_groups(first.captured)
        return self._done(engine)

    def _go_on(self, after: AfterForward) -> None:
        self.recorder = self._job.recorder = after.recorder.fork()
        self._checkpoints.begin(self.recorder, ())
        self.recorder.phase = Phase.BACKWARD

    def _run_engine(self, engine: Autograd, number: int) -> None:
        stage = self.graph.stages[number]
        if stage.loss is not None:
            engine.run(stage.loss)
        else:
            assert stage.output is not None
            engine.run_from(stage.output, stage.gradient_received())

    def _split_engine(self, kind: type[Part], number: int) -> Part:
        return kind(
            Split(self.graph, self.graph.stages[number]),
            self.graph,
            self.recorder,
            self._checkpoints,
            self._job.gradients,
            kernel_workspace=self._job.plan.training.kernel_workspace,
        )

    def _done(self, engine: Autograd) -> StageBackward:
        kept = engine.kept[0] if engine.kept else None
        return StageBackward(self.recorder.steps, kept, AfterForward(self.recorder, ()))
