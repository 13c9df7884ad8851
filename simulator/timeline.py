"""The timeline: live bytes by role step after step, and the set of storages alive at one moment."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import numpy.typing as npt

from simulator.fold import Location
from simulator.graph import Storage
from simulator.hand_over import BEFORE
from simulator.program import Identity, Leaf, Node, Occurrence, Reference, Seq, Step, Walk, identity
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
        for iteration in range(node.count if limit is None or node.first is not None else min(limit, node.count)):
            start = base if node.first is None else node.first + iteration * node.stride
            yield from _visits(node.body, start, (*iterations, iteration), limit)


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

    def storages(self, bindings: Bindings) -> list[Live]:
        """What is alive, largest first."""
        found = [
            Live((storage.label, None if layer == BEFORE else layer), storage, int(storage.size.allocated(bindings)))
            for (_, layer), alike in self._live.items()
            for storage in alike
        ]
        return sorted(found, key=lambda live: -live.nbytes)


def live_at(before: list[Node], node: Node, location: Location, bindings: Bindings) -> list[Live]:
    """The storages alive at `location` in `node`, which runs after the nodes `before`.

    Of repeats over micro-batches only the first iteration is run: it is where folding puts their peak.
    """
    live = LiveSet(concurrent=True)
    for earlier in before:
        for visit in visits(earlier, micro_batches=1):
            live.skip(visit)
    for visit in visits(node, micro_batches=1):
        if _holds(visit, location):
            return _run_to(live, visit, location).storages(bindings)
        live.skip(visit)
    raise AssertionError(f"no step {location.step.name} at {location.iterations}")


def _holds(visit: Visit, location: Location) -> bool:
    return visit.iterations == location.iterations and any(step is location.step for step in visit.leaf.steps)


def _run_to(live: LiveSet, visit: Visit, location: Location) -> LiveSet:
    """Run a straight run up to the births of `location`."""
    for step in visit.leaf.steps:
        live.run(Moment(step, visit.base, visit.iterations), deaths=step is not location.step)
        if step is location.step:
            break
    return live


def layer_at(node: Node, location: Location) -> int | None:
    """Real index of the layer at `location` in `node`; None outside the layers."""
    found = next(visit for visit in visits(node, micro_batches=1) if _holds(visit, location))
    return Moment(location.step, found.base, found.iterations).layer


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
