"""Lowering one micro-batch of a pipeline stage: forward, loss and backward as parts that a loop puts in order."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.autograd import Autograd
from simulator.graph import Op, StageGraph, Storage, Tensor
from simulator.micro_batch import AfterForward, MicroBatch
from simulator.program import Node, TreeBuilder
from simulator.recorder import Step


@attrs.frozen(eq=False)
class StageForward:
    """The forward of one micro-batch through one stage."""

    model: Sequence[Step]
    loss: Sequence[Step]
    """The loss function, which the loop calls when the last stage has returned; else nothing."""
    after: AfterForward
    """Where backward goes on: the loop still has the stage's output, and the loss."""


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


@attrs.frozen(eq=False)
class ForwardNodes:
    """A forward as parts of a program."""

    model: Node
    loss: Node | None
    recorded: StageForward

    @classmethod
    def of(cls, recorded: StageForward, builder: TreeBuilder) -> ForwardNodes:
        """Those of what was recorded."""
        return cls(builder.tree(recorded.model), builder.tree(recorded.loss) if recorded.loss else None, recorded)


class StageMicroBatch(MicroBatch):
    """What all loops have in common in how a stage runs."""

    def _run_model(self, stage: StageGraph) -> None:
        """The ops before those of the loss function."""
        self._run_ops(range(stage.first_op, self._border(stage)), self._returned(stage))

    def _run_loss(self, stage: StageGraph) -> None:
        """The ops of the loss function."""
        self._run_ops(range(self._border(stage), stage.end_op), self._returned(stage))

    @staticmethod
    def _border(stage: StageGraph) -> int:
        return stage.end_op if stage.loss_op is None else stage.loss_op

    @staticmethod
    def _returned(stage: StageGraph) -> set[Storage | None]:
        assert stage.output is not None
        return {stage.output.storage, stage.loss.storage if stage.loss else None}

    def _run_engine(self, engine: Autograd, stage: StageGraph) -> None:
        """Backward from the loss, or from the gradient that was received."""
        if stage.loss is not None:
            engine.run(stage.loss)
        else:
            assert stage.output is not None
            engine.run_from(stage.output, stage.gradient_received())

    def _done(self, engine: Autograd) -> StageBackward:
        kept = engine.kept[0] if engine.kept else None
        return StageBackward(self.recorder.steps, kept, AfterForward(self.recorder, ()))
