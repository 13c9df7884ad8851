"""A program is a tree of steps with repeats; unrolled it is the event list, folded it is the peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from hardware.dtypes import DType
from simulator.graph import Storage
from simulator.layout import Layout, Place
from simulator.recorder import Step as RecordedStep
from simulator.roles import Phase, Role
from simulator.sizes import Size


@attrs.frozen(eq=False)
class Buffer:
    """A storage as the program names it: the same label in every layer of a pattern."""

    label: str
    size: Size
    dtype: DType
    role: Role


@attrs.frozen(eq=False)
class Reference:
    """A buffer of one layer; `layer` counts from the turn's first layer inside a repeat, from 0 outside."""

    buffer: Buffer
    layer: int | None


@attrs.frozen(eq=False)
class Step:
    """One op: what it allocates, then what is freed after it."""

    name: str
    phase: Phase
    module: str
    layer: int | None
    births: tuple[Reference, ...]
    deaths: tuple[Reference, ...]


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


Node = Leaf | Seq | Repeat

#: What a storage is called in the unrolled program: label and real layer index.
Identity = tuple[str, int | None]


@attrs.frozen
class Event:
    """One allocation or free of the unrolled program."""

    step: Step
    layer: int | None
    """Real index of the layer the step runs in."""
    allocates: bool
    buffer: Buffer
    identity: Identity


def unroll(node: Node, base: int = 0) -> Iterator[Event]:
    """Every event in order; `base` is added to the layer index of references."""
    if isinstance(node, Leaf):
        yield from _leaf_events(node, base)
    elif isinstance(node, Seq):
        for part in node.parts:
            yield from unroll(part, base)
    else:
        for iteration in range(node.count):
            yield from unroll(node.body, base if node.first is None else node.first + iteration * node.stride)


def _leaf_events(leaf: Leaf, base: int) -> Iterator[Event]:
    for step in leaf.steps:
        layer = None if step.layer is None else base + step.layer
        for allocates, references in ((True, step.births), (False, step.deaths)):
            for reference in references:
                yield Event(step, layer, allocates, reference.buffer, identity(reference, base))


def identity(reference: Reference, base: int) -> Identity:
    """The one name of a storage in the unrolled program."""
    return reference.buffer.label, None if reference.layer is None else base + reference.layer


def checked(events: Iterator[Event]) -> Iterator[Event]:
    """The same events, with the invariant that nothing is allocated or freed twice."""
    live: set[Identity] = set()
    for event in events:
        if event.allocates:
            assert event.identity not in live, f"{event.identity} is allocated twice, at {event.step.name}"
            live.add(event.identity)
        else:
            assert event.identity in live, f"{event.identity} is freed but not live, at {event.step.name}"
            live.remove(event.identity)
        yield event


# from recorded steps to a tree ---------------------------------------------------------------------------------------


class TreeBuilder:
    """Turns recorded steps of a built model into the tree of the real one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._buffers: dict[Storage, Buffer] = {}
        self._references: dict[tuple[Storage, int | None], Reference] = {}

    def tree(self, steps: Sequence[RecordedStep]) -> Node:
        """Consecutive steps of one turn of a pattern become a `Repeat`, the others a `Leaf`.

        Steps that neither allocate nor free (views, in-place updates) are left out.
        """
        steps = [part for step in steps if step.births or step.deaths for part in self._by_layer(step)]
        parts: list[Node] = []
        start = 0
        while start < len(steps):
            place = self._place(steps[start].slot)
            end = start
            while end < len(steps) and _same_turn(place, self._place(steps[end].slot)):
                end += 1
            parts.append(self._part(steps[start:end], place))
            start = end
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _by_layer(self, step: RecordedStep) -> list[RecordedStep]:
        """A step outside the stack that frees storages of layers (autocast's cache, say) frees every layer's own."""
        layered = [s for s in step.deaths if s.slot is not None] if step.slot is None else []
        if not layered:
            return [step]
        kept = attrs.evolve(step, deaths=[s for s in step.deaths if s.slot is None])
        by_slot: dict[int | None, list[Storage]] = {}
        for storage in layered:
            by_slot.setdefault(storage.slot, []).append(storage)
        return [
            kept,
            *(RecordedStep("free", step.phase, step.module, slot, [], found) for slot, found in by_slot.items()),
        ]

    def _part(self, steps: Sequence[RecordedStep], place: Place | None) -> Node:
        leaf = Leaf(tuple(self._step(step, place) for step in steps))
        if place is None:
            return leaf
        period = place.run.period
        if not _descends(steps):
            return Repeat(place.repeats, leaf, place.base, period)
        return Repeat(place.repeats, leaf, place.base + (place.repeats - 1) * period, -period)

    def _place(self, slot: int | None) -> Place | None:
        return None if slot is None else self._layout.places[slot]

    def _step(self, step: RecordedStep, place: Place | None) -> Step:
        offset = None if place is None or step.slot is None else self._layout.places[step.slot].offset
        births = tuple(self._reference(s, place) for s in step.births)
        deaths = tuple(self._reference(s, place) for s in step.deaths)
        return Step(step.name, step.phase, step.module, offset, births, deaths)

    def _reference(self, storage: Storage, place: Place | None) -> Reference:
        key = (storage, self._layer(storage.slot, place))
        known = self._references.get(key)
        if known is None:
            known = Reference(self._buffer(storage), key[1])
            self._references[key] = known
        return known

    def _buffer(self, storage: Storage) -> Buffer:
        buffer = self._buffers.get(storage)
        if buffer is None:
            buffer = Buffer(storage.label, storage.size, storage.dtype, storage.role)
            self._buffers[storage] = buffer
        return buffer

    def _layer(self, slot: int | None, place: Place | None) -> int | None:
        if slot is None:
            return None
        if place is None:
            own = self._layout.places[slot]
            assert own.repeats == 1, "a step outside the stack reaches into one of several hidden layers"
            return own.base + own.offset
        return self._relative(slot, place)

    def _relative(self, slot: int, place: Place) -> int:
        """Distance in layers from this turn's first layer; neighbours lie next to each other whatever is hidden."""
        first = place.run.first_slot + place.turn * place.run.period
        distance = slot - first
        assert -place.run.period <= distance < 2 * place.run.period, "a layer reaches further than its neighbours"
        return distance


def _same_turn(left: Place | None, right: Place | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.run == right.run and left.turn == right.turn


def _descends(steps: Sequence[RecordedStep]) -> bool:
    """Backward visits layers last to first."""
    return any(step.phase in (Phase.BACKWARD, Phase.RECOMPUTE) for step in steps)
