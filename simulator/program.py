"""A program is a tree of steps with repeats; unrolled it is the event list, folded it is the peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter

import attrs

from simulator.graph import ForwardGraph, Storage
from simulator.hand_over import BEFORE, HandOver
from simulator.layout import Layout
from simulator.recorder import Step as RecordedStep
from simulator.roles import Phase


@attrs.frozen(eq=False)
class Reference:
    """A storage of one layer; `layer` counts from the turn's first layer inside a repeat, from 0 outside."""

    storage: Storage
    layer: int | None


@attrs.frozen(eq=False)
class Step:
    """One op as it was recorded: what it allocates, then what is freed after it."""

    recorded: RecordedStep
    number: Callable[[int], int]
    """The layer that a built slot is, as references of this step count it."""

    @property
    def name(self) -> str:
        """The kernel or call."""
        return self.recorded.name

    @property
    def phase(self) -> Phase:
        """The part of a training step it belongs to."""
        return self.recorded.phase

    @property
    def module(self) -> str:
        """Dotted path of the module that runs it."""
        return self.recorded.module

    @property
    def layer(self) -> int | None:
        """The layer it runs in; None outside the layers."""
        return None if self.recorded.slot is None else self.number(self.recorded.slot)

    @cached_property
    def births(self) -> tuple[Reference, ...]:
        """What it allocates."""
        return tuple(map(self._reference, self.recorded.births))

    @cached_property
    def deaths(self) -> tuple[Reference, ...]:
        """What is freed after it."""
        return tuple(map(self._reference, self.recorded.deaths))

    def _reference(self, storage: Storage) -> Reference:
        return Reference(storage, None if storage.slot is None else self.number(storage.slot))


@attrs.frozen(eq=False)
class Leaf:
    """A straight run of steps."""

    steps: tuple[Step, ...]


@attrs.frozen(eq=False)
class Seq:
    """One part after the other."""

    parts: tuple[Node, ...]


@attrs.frozen(eq=False)
class Repeat:
    """`count` times `body`; iteration i runs on the layers from ``first + i * stride`` on (None: no layer index)."""

    count: int
    body: Node
    first: int | None = None
    stride: int = 0
    whole: bool = False
    """Whether a timeline must not leave out iterations over micro-batches: something else undoes what they do."""


@attrs.frozen(eq=False)
class Walk:
    """Layers in order, each a straight run on the layers from its number on; those alike share one leaf."""

    parts: tuple[tuple[Leaf, int], ...]


@attrs.frozen(eq=False)
class Occurrence:
    """`body` where a program has it several times, here and there (a pipeline's micro-batches): the `number`-th."""

    number: int
    body: Node


Node = Leaf | Seq | Repeat | Walk | Occurrence

_LAST_TO_FIRST = frozenset((Phase.BACKWARD, Phase.RECOMPUTE))

#: What a storage is called in the unrolled program: label and real layer index.
Identity = tuple[str, int | None]


def identity(reference: Reference, base: int) -> Identity:
    """The one name of a storage in the unrolled program."""
    storage = reference.storage
    return storage.handed_on or storage.label, None if reference.layer is None else base + reference.layer


# from recorded steps to a tree ---------------------------------------------------------------------------------------


class TreeBuilder:
    """Turns recorded steps of a built model into the tree of the real one."""

    def __init__(self, layout: Layout, graph: ForwardGraph) -> None:
        self._layout = layout
        self._hand_over = HandOver(layout, graph) if layout.scattered else None
        self._turns = [(place.run.first_slot, place.turn) for place in layout.places]
        self._real = {slot: place.base + place.offset for slot, place in enumerate(layout.places)}
        if self._hand_over:
            self._real |= {BEFORE: BEFORE, len(layout.places) - 1: len(layout.slots()) - 1}

    def check(self) -> None:
        """Raise `Unlike` where the layers that were turned into trees are not what they stand for."""
        if self._hand_over is not None:
            self._hand_over.check()

    def tree(self, steps: Sequence[RecordedStep], *, upward: bool = False) -> Node:
        """Consecutive steps of one turn of a pattern become a `Repeat`, the others a `Leaf`.

        Steps that neither allocate nor free (views, in-place updates) are left out.

        Args:
            upward: whether a backward, too, visits layers first to last.
        """
        if self._hand_over is not None:
            self._hand_over.see(steps)
        active = [part for step in steps if step.births or step.deaths for part in self._by_layer(step)]
        groups = [list(group) for _, group in groupby(active, key=self._turn)]
        parts = self._spread(groups) if self._hand_over else [self._part(group, upward) for group in groups]
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _spread(self, groups: list[list[RecordedStep]]) -> list[Node]:
        """Passes over the built layers, from the first or the last on, as passes over those of the real model."""
        parts: list[Node] = []
        one_pass: dict[int, Leaf] = {}
        assert self._hand_over is not None
        outlives = self._hand_over.outlives(step for group in groups for step in group)
        for before, group in zip([None, *groups], groups, strict=False):
            slot, last = group[0].slot, before and before[0].slot
            if slot is None or last is None or slot in one_pass:
                parts += self._over_layers(one_pass)
                one_pass = {}
            if slot is None:
                parts.append(self._part(group))
            else:
                one_pass[slot] = self._leaf(group, slot, 1, 1)
                if slot == 0 and self._hand_over.given is not None:
                    later = self._hand_over.later(group, outlives=outlives and group[0].phase is Phase.FORWARD)
                    outlives = False  # it goes but once
                    if later is not group:
                        one_pass[BEFORE] = one_pass[slot]
                        one_pass[slot] = self._leaf(later, slot, 1, 1)
        return [*parts, *self._over_layers(one_pass)]

    def _over_layers(self, leaves: Mapping[int, Leaf]) -> list[Node]:
        order = [slot for slot in leaves if slot != BEFORE]
        up = all(first < second for first, second in pairwise(order))
        down = all(first > second for first, second in pairwise(order))
        assert up or down, "layers without a period take turns"
        layers = list(enumerate(self._layout.slots()))
        if BEFORE in leaves:
            layers[0] = 0, BEFORE
        backward = len(order) == 1 and any(_descends(leaf.steps) for leaf in leaves.values())
        up = up and not backward
        walk = [(leaves[slot], layer) for layer, slot in (layers if up else layers[::-1]) if slot in leaves]
        stride = 1 if up else -1
        steps = [(leaf, layer - stride * place, layer) for place, (leaf, layer) in enumerate(walk)]
        stretches = [list(group) for _, group in groupby(steps, key=itemgetter(0, 1))]  # next to each other, and alike
        if len(stretches) > len(walk) // 4:
            return [Walk(tuple(walk))] if walk else []
        return [Repeat(len(part), part[0][0], part[0][2], stride) for part in stretches]

    def _turn(self, step: RecordedStep) -> tuple[int, int] | None:
        """What steps of one turn of a pattern have in common; None outside the stack."""
        return None if step.slot is None else self._turns[step.slot]

    def _by_layer(self, step: RecordedStep) -> list[RecordedStep]:
        """A step outside the stack that frees storages of layers (autocast's cache, say) frees every layer's own."""
        if step.slot is not None:
            return [step]
        layered = [s for s in step.deaths if s.slot not in (None, BEFORE)]
        if not layered:
            return [step]
        kept = attrs.evolve(step, deaths=[s for s in step.deaths if s.slot in (None, BEFORE)])
        by_slot: dict[int | None, list[Storage]] = {}
        for storage in layered:  # what the last layer of all has handed on dies once
            by_slot.setdefault(None if storage.handed_on else storage.slot, []).append(storage)
        return [
            kept,
            *(RecordedStep("free", step.phase, step.module, slot, [], found) for slot, found in by_slot.items()),
        ]

    def _part(self, steps: list[RecordedStep], upward: bool = False) -> Node:
        slot = steps[0].slot
        if slot is None:
            return self._outside(steps)
        place = self._layout.places[slot]
        period = place.run.period
        first = place.run.first_slot + place.turn * period
        reach = period * place.run.reach
        leaf = self._leaf(steps, first, period, reach)
        if upward or not _descends(steps):
            return Repeat(place.repeats, leaf, place.base, period)
        return Repeat(place.repeats, leaf, place.base + (place.repeats - 1) * period, -period)

    def _outside(self, steps: Sequence[RecordedStep]) -> Leaf:
        """Steps outside the stack: references have real layer indices."""
        named = [s for step in steps for s in (*step.births, *step.deaths) if s.slot is not None]
        slots = {s.slot for s in named if s.slot is not None and not s.handed_on}
        alone = all(self._layout.places[slot].repeats == 1 for slot in slots)
        assert alone, "a step outside the stack reaches into one of several hidden layers"
        return Leaf(tuple([Step(step, self._real.__getitem__) for step in steps]))

    def _leaf(self, steps: Sequence[RecordedStep], first: int, period: int, reach: int) -> Leaf:
        """Steps of the turn that starts at slot `first`: its references count from there."""
        slots = {storage.slot for step in steps for storage in step.deaths if storage.slot is not None}
        near = not slots or first - reach <= min(slots) <= max(slots) < first + period + reach
        assert near, "a layer reaches further than it said"
        return Leaf(tuple([Step(step, lambda slot: slot - first) for step in steps]))


def _descends(steps: Sequence[RecordedStep | Step]) -> bool:
    """Backward visits layers last to first."""
    return not _LAST_TO_FIRST.isdisjoint([step.phase for step in steps])
