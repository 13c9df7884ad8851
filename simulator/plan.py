"""A plan: one training run before it is lowered. Strategies map one plan to the next and never change it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import attrs

from simulator.families import families
from simulator.graph import ForwardGraph
from simulator.layout import Layout, layout_of
from simulator.model import ModelSpec
from simulator.sizes import Dimensions
from simulator.trace import Regime, Trace
from simulator.workload import Training

#: The dimension that counts the trainable tensors of the whole model.
TRAINABLE_TENSORS = "tensors"


@attrs.frozen(eq=False)
class Plan:
    """What `lower` turns into a program.

    The forward graph says what is computed and kept; the saved-set policy says what is computed again.
    """

    model: ModelSpec
    training: Training
    layout: Layout
    graph: ForwardGraph
    dimensions: Dimensions
    recomputed: frozenset[int] = frozenset()
    """Saved-set policy: built slots of the layers whose saved tensors are dropped and recomputed in backward."""
    applied: tuple[str, ...] = ()
    """Names of the strategies applied so far, in order."""


class Strategy(Protocol):
    """One technique: a plan in, another plan out (docs/extending.md)."""

    @property
    def name(self) -> str:
        """The name under which users ask for it."""
        ...

    def __call__(self, plan: Plan) -> Plan:
        """The plan with this technique applied; `UnsupportedError` with the reason where it cannot be."""
        ...


def make_plan(model: ModelSpec, training: Training, layout: Layout | None = None) -> Plan:
    """The plan of a run without any strategy: everything on one device, everything saved.

    Args:
        layout: which layers to build; by default at most three turns of each repeating pattern.
    """
    layout = layout or layout_of(model.layers)
    values = {"b": training.micro_batch, "s": training.seq_len, "h": model.hidden, "V": model.vocab}
    trace = Trace(_regime(training), Dimensions(values))
    forward = families.get(model.family).forward
    assert forward is not None, f"family {model.family!r} has no recipe"
    forward(trace, model, layout.built(model.layers))
    trace.end_autocast()
    trace.dim(TRAINABLE_TENSORS, _trainable_tensors(trace.graph, layout))
    return Plan(model, training, layout, trace.graph, trace.dimensions)


def _trainable_tensors(graph: ForwardGraph, layout: Layout) -> int:
    slots = [t.storage.slot for t in graph.parameters if t.requires_grad]
    return sum(1 if slot is None else layout.places[slot].repeats for slot in slots)


def apply(plan: Plan, strategies: Sequence[Strategy]) -> Plan:
    """`plan` after every strategy in turn."""
    for strategy in strategies:
        plan = strategy(plan)
        plan = attrs.evolve(plan, applied=(*plan.applied, strategy.name))
    return plan


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
