"""Lowering a training run: load, a cold optimizer step and a steady one, as one program."""

from __future__ import annotations

import attrs

from simulator.families import families
from simulator.graph import ForwardGraph, Storage
from simulator.layout import Layout, layout_of
from simulator.micro_batch import MicroBatch
from simulator.model import ModelSpec
from simulator.optimizers import optimizers
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.program import Node, Repeat, Seq, TreeBuilder
from simulator.recorder import Step
from simulator.roles import Phase
from simulator.sizes import Bindings, Dimensions
from simulator.trace import Regime, Trace
from simulator.workload import Training


@attrs.frozen(eq=False)
class TrainingProgram:
    """The program of a training run and the values of its dimensions."""

    load: Node
    cold: Node
    steady: Node
    bindings: Bindings

    @property
    def whole(self) -> Node:
        """Load, cold step and steady step in sequence."""
        return Seq((self.load, self.cold, self.steady))


def trace_forward(
    model: ModelSpec, training: Training, layout: Layout | None = None
) -> tuple[ForwardGraph, Dimensions]:
    """The forward graph of one micro-batch and its dimension table.

    Args:
        layout: which layers to build; by default at most three turns of each repeating pattern.
    """
    values = {"b": training.micro_batch, "s": training.seq_len, "h": model.hidden, "V": model.vocab}
    dimensions = Dimensions(values)
    trace = Trace(_regime(training), dimensions)
    forward = families.get(model.family).forward
    assert forward is not None
    forward(trace, model, (layout or layout_of(model.layers)).built(model.layers))
    trace.end_autocast()
    return trace.graph, dimensions


def _regime(training: Training) -> Regime:
    return Regime(
        weights=training.weights,
        autocast=training.autocast,
        attention=training.attention,
        sdpa_backend=training.sdpa_backend,
        torch=training.torch,
        attention_mask=training.attention_mask,
        fused_activation_backward=training.fused_activation_backward,
        loss_division=training.gradient_accumulation > 1,
    )


def lower_training(model: ModelSpec, training: Training, layout: Layout | None = None) -> TrainingProgram:
    """The program of loading `model`, one cold and one steady optimizer step of `training`."""
    layout = layout or layout_of(model.layers)
    graph, dimensions = trace_forward(model, training, layout)
    return _Lowering(graph, training, layout).program(dimensions.bindings)


class _Lowering:
    def __init__(self, graph: ForwardGraph, training: Training, layout: Layout) -> None:
        self.graph = graph
        self.training = training
        self.builder = TreeBuilder(layout)
        slots = range(len(layout.places)) if training.checkpointing == "full" else ()
        self.checkpointed = frozenset(slots)
        self.gradients: dict[Storage, Storage] = {}

    def program(self, bindings: Bindings) -> TrainingProgram:
        load = self.builder.tree(self._load())
        first = self._micro_batch()
        keep_gradients = self.training.zero_grad == "zero"
        later = self._micro_batch() if self.training.gradient_accumulation > 1 or keep_gradients else first
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

    def _micro_batch(self) -> Node:
        lowering = MicroBatch(
            self.graph,
            self.checkpointed,
            self.gradients,
            keep_outputs=self.training.keep_outputs,
            fused_activation_backward=self.training.fused_activation_backward,
        )
        return self.builder.tree(lowering.lower().steps)

    def _optimizer(self, states: dict[tuple[Storage, str], Storage]) -> list[Node]:
        step = OptimizerStep(self.training.optimizer, self._parameters(), states)
        optimizers.get(self.training.optimizer.name)(step)
        if self.training.zero_grad == "none":
            step.free([p.gradient for p in step.parameters])
        return [self.builder.tree(step.steps)] if step.steps else []
