"""The timeline: live bytes by role step after step, and the set of storages alive at one moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from simulator.fold import Location
from simulator.graph import Storage
from simulator.hand_over import BEFORE
from simulator.program import Identity, Leaf, Node, Occurrence, Reference, Repeat, Seq, Step, Walk, identity
from simulator.roles import Phase, Role
from simulator.sizes import Bindings


@attrs.frozen(eq=False)
class Moment:
    """One step of the unrolled program and where it runs."""

    step: Step
    base: int
    iterations: tuple[int, ...]

    @property
    def layer(self) -> int | None:
        """Real index of the layer the step runs in."""
        return None if self.step.layer is None else self.base + self.step.layer


@attrs.frozen(eq=False)
class Visit:
    """One straight run of steps and where it runs."""

    leaf: Leaf
    base: int
    iterations: tuple[int, ...]


def visits(node: Node, micro_batches: int | None = None) -> Iterator[Visit]:
    """Every straight run of `node` in order.

    Args:
        micro_batches: of repeats over micro-batches, run only the first so many; each leaves behind
            what the one before it left, so nothing else changes.
    """
    yield from _visits(node, 0, (), micro_batches)


def _visits(node: Node, base: int, iterations: tuple[int, ...], limit: int | None) -> Iterator[Visit]:
    if isinstance(node, Leaf):
        yield Visit(node, base, iterations)
    elif isinstance(node, Seq):
        for part in node.parts:
            yield from _visits(part, base, iterations, limit)
    elif isinstance(node, Occurrence):
        yield from _visits(node.body, base, (*iterations, node.number), limit)
    elif isinstance(node, Walk):
        for iteration, (leaf, layer) in enumerate(node.parts):
            yield Visit(leaf, layer, (*iterations, iteration))
    else:
        every = limit is None or node.whole or node.first is not None
        for iteration in range(node.count if every else min(limit or 0, node.count)):
            start = base if node.first is None else node.first + iteration * node.stride
            yield from _visits(node.body, start, (*iterations, iteration), limit)


def turns_left_out(node: Node, micro_batches: int) -> int:
    """How many turns over micro-batches `visits` does not run where it runs so many of each repeat."""
    if isinstance(node, Seq):
        return sum(turns_left_out(part, micro_batches) for part in node.parts)
    if isinstance(node, Occurrence):
        return turns_left_out(node.body, micro_batches)
    if isinstance(node, Repeat) and node.first is None and not node.whole:
        return max(0, node.count - micro_batches)
    return 0


def moments(node: Node, micro_batches: int | None = None) -> Iterator[Moment]:
    """Every step of `node` in order; see `visits`."""
    for visit in visits(node, micro_batches):
        for step in visit.leaf.steps:
            yield Moment(step, visit.base, visit.iterations)


@attrs.frozen
class Live:
    """A storage alive at some moment."""

    identity: Identity
    storage: Storage
    nbytes: int
    """Allocated bytes: rounded up to 512."""


class LiveSet:
    """Storages alive, kept up to date step by step; asserts that nothing is allocated or freed twice.

    Args:
        concurrent: whether several micro-batches may be alive at once (a pipeline), whose storages have one name.
    """

    def __init__(self, *, concurrent: bool = False) -> None:
        self._concurrent = concurrent
        self._live: dict[Identity, list[Storage]] = {}
        self._nets: dict[Leaf, tuple[list[Reference], list[Reference]]] = {}

    def run(self, moment: Moment, *, deaths: bool = True) -> None:
        """Apply one step; without its `deaths`, the state at the step's own peak."""
        for reference in moment.step.births:
            name = identity(reference, moment.base)
            assert self._concurrent or name not in self._live, f"{name} is allocated twice, at {moment.step.name}"
            self._live.setdefault(name, []).append(reference.storage)
        for reference in moment.step.deaths if deaths else ():
            name = identity(reference, moment.base)
            assert name in self._live, f"{name} is freed but not live, at {moment.step.name}"
            self._remove(name)

    def _remove(self, name: Identity) -> None:
        self._live[name].pop()
        if not self._live[name]:
            del self._live[name]

    def skip(self, visit: Visit) -> None:
        """Apply what a whole straight run leaves behind, without its steps."""
        born, died = self._net(visit.leaf)
        for reference in died:
            self._remove(identity(reference, visit.base))
        for reference in born:
            self._live.setdefault(identity(reference, visit.base), []).append(reference.storage)

    def _net(self, leaf: Leaf) -> tuple[list[Reference], list[Reference]]:
        """References born in `leaf` that survive it, and those that die in it without being born there."""
        if leaf not in self._nets:
            born: dict[Identity, list[Reference]] = {}
            died: list[Reference] = []
            for step in leaf.steps:
                for reference in step.births:
                    born.setdefault(identity(reference, 0), []).append(reference)
                for reference in step.deaths:
                    own = born.get(identity(reference, 0))
                    if own:
                        own.pop()
                    else:
                        died.append(reference)
            self._nets[leaf] = [reference for references in born.values() for reference in references], died
        return self._nets[leaf]

    def counts(self) -> dict[Identity, int]:
        """How many storages of each name are alive."""
        return {name: len(alike) for name, alike in self._live.items()}

    def change_again(self, before: dict[Identity, int], times: int) -> None:
        """Repeat so many times what has changed since there were as many of each name as `before`."""
        known = dict(self._live)
        for name in {*before, *known}:
            more = len(known.get(name, ())) - before.get(name, 0)
            for _ in range(times * -more):
                self._remove(name)
            if more > 0:
                known[name].extend(known[name][-1:] * (times * more))

    def storages(self, bindings: Bindings) -> list[Live]:
        """What is alive, largest first."""
        found = [
            Live((storage.label, None if layer == BEFORE else layer), storage, int(storage.size.allocated(bindings)))
            for (_, layer), alike in self._live.items()
            for storage in alike
        ]
        return sorted(found, key=lambda live: -live.nbytes)


def live_at(before: list[Node], node: Node, location: Location, bindings: Bindings) -> list[Live]:
    """The storages alive at `location` in `node`, which runs after the nodes `before`."""
    live = LiveSet(concurrent=True)
    for earlier in before:
        _run(live, earlier, 0)
    _run_until(live, node, location)
    return live.storages(bindings)


def _run(live: LiveSet, node: Node, base: int, turns: int | None = None) -> None:
    """Run `node`, of a repeat only so many turns; what one turn over a micro-batch leaves, the others leave as well."""
    if isinstance(node, Leaf):
        live.skip(Visit(node, base, ()))
    elif isinstance(node, Repeat) and node.first is None:
        turns = node.count if turns is None else turns
        before = live.counts() if turns > 1 else {}
        if turns:
            _run(live, node.body, base)
        if turns > 1:
            live.change_again(before, turns - 1)
    else:
        for part, start in _parts(node, base)[:turns]:
            _run(live, part, start)


def _run_until(live: LiveSet, node: Node, location: Location) -> None:
    """Run `node` up to the births of the step at `location`."""
    base, place = 0, location.iterations
    while not isinstance(node, Leaf):
        if isinstance(node, Repeat) and node.first is None:
            _run(live, node, base, place[0])
            node, place = node.body, place[1:]
            continue
        parts = _parts(node, base)
        index, place = _next(node, [part for part, _ in parts], location, place)
        for part, start in parts[:index]:
            _run(live, part, start)
        node, base = parts[index]
    _run_to(live, Visit(node, base, location.iterations), location)


def _parts(node: Seq | Repeat | Walk | Occurrence, base: int) -> list[tuple[Node, int]]:
    """What `node` runs one after the other, each with its base."""
    if isinstance(node, Seq):
        return [(part, base) for part in node.parts]
    if isinstance(node, Occurrence):
        return [(node.body, base)]
    if isinstance(node, Walk):
        return list(node.parts)
    start = base if node.first is None else node.first
    return [(node.body, start + turn * node.stride) for turn in range(node.count)]


def _next(node: Node, parts: Sequence[Node], location: Location, place: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Which of the parts of `node` has `location`, and where in it, if `place` is where it is in `node`."""
    if isinstance(node, Seq):
        return next(i for i, part in enumerate(parts) if _contains(part, location, place)), place
    return 0 if isinstance(node, Occurrence) else place[0], place[1:]


def _contains(node: Node, location: Location, place: tuple[int, ...]) -> bool:
    """Whether the step of `location` is at `place` in `node`."""
    if isinstance(node, Leaf):
        return not place and any(step is location.step for step in node.steps)
    if isinstance(node, Seq):
        return any(_contains(part, location, place) for part in node.parts)
    if not place:
        return False
    if isinstance(node, Walk):
        return place[0] < len(node.parts) and _contains(node.parts[place[0]][0], location, place[1:])
    here = place[0] == node.number if isinstance(node, Occurrence) else place[0] < node.count
    return here and _contains(node.body, location, place[1:])


def _run_to(live: LiveSet, visit: Visit, location: Location) -> LiveSet:
    """Run a straight run up to the births of `location`."""
    for step in visit.leaf.steps:
        live.run(Moment(step, visit.base, visit.iterations), deaths=step is not location.step)
        if step is location.step:
            break
    return live


def layer_at(node: Node, location: Location) -> int | None:
    """Real index of the layer at `location` in `node`; None outside the layers."""
    base, place = 0, location.iterations
    while not isinstance(node, Leaf):
        parts = _parts(node, base)
        index, place = _next(node, [part for part, _ in parts], location, place)
        node, base = parts[index]
    return Moment(location.step, base, location.iterations).layer


@attrs.frozen(eq=False)
class Timeline:
    """Live bytes by role after the births of each step.

    Attributes:
        roles: the columns of `nbytes`.
        nbytes: int64 array ``[steps, roles]``, allocated bytes (512 B rounding).
        phases: the phase of each step.
        marks: index of the first step of each named part (``load``, ``cold``, ``steady``).
    """

    roles: tuple[Role, ...]
    nbytes: npt.NDArray[np.int64]
    phases: tuple[Phase, ...]
    marks: dict[str, int]

    @property
    def total(self) -> npt.NDArray[np.int64]:
        """Live bytes of all roles after the births of each step."""
        totals: npt.NDArray[np.int64] = self.nbytes.sum(axis=1)
        return totals


def timeline(parts: dict[str, Node], bindings: Bindings, micro_batches: int | None = None) -> Timeline:
    """Run the named `parts` one after the other and record live bytes by role."""
    roles = tuple(Role)
    column = {role: i for i, role in enumerate(roles)}
    live = [0] * len(roles)
    rows: list[list[int]] = []
    phases: list[Phase] = []
    marks: dict[str, int] = {}
    prices: dict[Storage, int] = {}
    for name, node in parts.items():
        marks[name] = len(rows)
        for moment in moments(node, micro_batches):
            for reference in moment.step.births:
                live[column[reference.storage.role]] += _price(reference.storage, bindings, prices)
            rows.append(live.copy())
            phases.append(moment.step.phase)
            for reference in moment.step.deaths:
                live[column[reference.storage.role]] -= _price(reference.storage, bindings, prices)
    return Timeline(roles, np.array(rows, dtype=np.int64), tuple(phases), marks)


def _price(storage: Storage, bindings: Bindings, known: dict[Storage, int]) -> int:
    if storage not in known:
        known[storage] = int(storage.size.allocated(bindings))
    return known[storage]
