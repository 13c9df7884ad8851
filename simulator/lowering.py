"""Lowering a training run: load, a cold optimizer step and a steady one, as one program."""

from __future__ import annotations

import attrs

from simulator.graph import Storage
from simulator.micro_batch import MicroBatch
from simulator.optimizers import optimizers
from simulator.optimizers.clipping import clip_gradient_norm
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import TRAINABLE_TENSORS, Plan
from simulator.program import Node, Repeat, Seq, TreeBuilder
from simulator.recorder import Step
from simulator.roles import Phase
from simulator.sizes import Bindings


@attrs.frozen(eq=False)
class TrainingProgram:
    """The program of a training run and the values of its dimensions."""

    load: Node
    cold: Node
    steady: Node
    bindings: Bindings


def lower(plan: Plan) -> TrainingProgram:
    """The program of `plan`: load the model, one cold and one steady optimizer step."""
    return _Lowering(plan).program(plan.dimensions.bindings)


class _Lowering:
    def __init__(self, plan: Plan) -> None:
        self.graph = plan.graph
        self.training = plan.training
        self.builder = TreeBuilder(plan.layout)
        self.checkpointed = plan.recomputed
        self.gradients: dict[Storage, Storage] = {}

    def program(self, bindings: Bindings) -> TrainingProgram:
        load = self.builder.tree(self._load())
        micro_batch = self._micro_batch()
        forward = self.builder.tree(micro_batch.forward())
        first = Seq((forward, self.builder.tree(micro_batch.backward(self.gradients))))
        keep_gradients = self.training.zero_grad == "zero"
        later = first
        if keep_gradients or self.training.gradient_accumulation > 1:
            later = Seq((forward, self.builder.tree(micro_batch.backward(self.gradients))))
        states: dict[tuple[Storage, str], Storage] = {}
        cold = self._step(first, later, self._optimizer(states))
        steady = self._step(later if keep_gradients else first, later, self._optimizer(states))
        return TrainingProgram(load, cold, steady, bindings)

    def _step(self, first: Node, later: Node, optimizer: list[Node]) -> Node:
        more = self.training.gradient_accumulation - 1
        return Seq((first, *([Repeat(more, later)] if more else []), *optimizer))

    def _load(self) -> list[Step]:
        leaves = [*self.graph.parameters, *self.graph.buffers]
        return [Step(f"load {t.storage.label}", Phase.LOAD, "", t.storage.slot, [t.storage]) for t in leaves]

    def _parameters(self) -> list[Parameter]:
        trainable = [t for t in self.graph.parameters if t.requires_grad]
        return [Parameter(t.storage, self.gradients[t.storage], t.shape) for t in trainable]

    def _micro_batch(self) -> MicroBatch:
        return MicroBatch(
            self.graph,
            self.checkpointed,
            keep_outputs=self.training.keep_outputs,
            kernel_workspace=self.training.kernel_workspace,
        )

    def _optimizer(self, states: dict[tuple[Storage, str], Storage]) -> list[Node]:
        step = OptimizerStep(self.training.optimizer, self._parameters(), TRAINABLE_TENSORS, states)
        if self.training.clip is not None:
            clip_gradient_norm(step)
        optimizers.get(self.training.optimizer.name)(step)
        step.finish()
        if self.training.zero_grad == "none":
            step.free([p.gradient for p in step.parameters])
        return [self.builder.tree(step.steps)] if step.steps else []  # plain SGD allocates nothing at all
