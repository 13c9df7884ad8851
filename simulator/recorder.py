"""Counts references to storages and writes down, step by step, what is born and what dies."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.graph import Storage
from simulator.roles import Phase


@attrs.define(eq=False)
class Step:
    """One op as the dispatcher sees it: first its births, then the deaths that follow it."""

    name: str
    phase: Phase
    module: str
    slot: int | None
    births: list[Storage] = attrs.field(factory=list)
    deaths: list[Storage] = attrs.field(factory=list)


class Recorder:
    """The list of steps so far and how many references each live storage has.

    Args:
        by_layer: whether what a layer frees dies in a step of that layer, even before it has allocated anything.
    """

    def __init__(self, *, by_layer: bool = False) -> None:
        self._by_layer = by_layer
        self.steps: list[Step] = []
        self._references: dict[Storage, int] = {}
        self._sources: dict[Storage, list[Storage]] = {}
        self.phase = Phase.FORWARD
        self.module = ""
        self.slot: int | None = None

    def fork(self) -> Recorder:
        """A recorder that goes on from here with steps of its own."""
        other = Recorder(by_layer=self._by_layer)
        other._references = dict(self._references)
        other._sources = {storage: list(sources) for storage, sources in self._sources.items()}
        return other

    def run(self, name: str, births: list[Storage]) -> None:
        """Record one op that allocates `births`, each held once by its maker.

        An op that allocates nothing (a view, an update in place) leaves no step; what dies after it
        dies after the step recorded last.
        """
        if not births:
            return
        self.steps.append(Step(name, self.phase, self.module, self.slot, births))
        for storage in births:
            self._references[storage] = self._references.get(storage, 0) + 1

    def note(self, name: str) -> None:
        """Record a step that allocates nothing, for what is freed before anything is allocated."""
        self.steps.append(Step(name, self.phase, self.module, self.slot))

    def retain(self, storage: Storage, count: int = 1) -> None:
        """Add references; storages that live for ever are not counted."""
        if not storage.persistent:
            self._references[storage] = self._references.get(storage, 0) + count

    def hand_over(self, storage: Storage, count: int) -> None:
        """The maker of `storage` lets go of it, and `count` others hold it."""
        if count and not storage.persistent:
            self._references[storage] += count - 1
        else:
            self.release(storage)

    def release(self, storage: Storage) -> None:
        """Drop one reference; at zero the storage dies after the step recorded last."""
        if storage.persistent:
            return
        left = self._references[storage] - 1
        if left:
            self._references[storage] = left
            return
        del self._references[storage]
        if self._by_layer and self.steps[-1].slot != self.slot:
            self.note("free")
        self.steps[-1].deaths.append(storage)
        for source in self._sources.pop(storage, ()):
            self.release(source)

    def dying_with(self, storage: Storage) -> list[Storage]:
        """What dies when one reference to `storage` is dropped, itself and what it is computed from."""
        left: dict[Storage, int] = {}
        pending, dead = [storage], []
        while pending:
            one = pending.pop()
            left[one] = left.get(one, self.references(one)) - 1
            if left[one] == 0 and not one.persistent:
                dead.append(one)
                pending += self._sources.get(one, [])
        return dead

    def hold_for(self, storage: Storage, sources: Sequence[Storage]) -> None:
        """Keep `sources` until `storage` dies: what is not in memory itself is computed from them when it is needed."""
        for source in sources:
            self.retain(source)
        self._sources.setdefault(storage, []).extend(sources)

    def unmake(self, storage: Storage) -> None:
        """The kernel that made `storage` wrote somewhere else instead; nobody but the caller may hold it."""
        assert self._references.pop(storage) == 1, "somebody else holds what was not made"
        step = next(step for step in reversed(self.steps) if storage in step.births)
        step.births.remove(storage)

    def let_go(self, storage: Storage) -> None:
        """Drop the last reference to `storage`, which an earlier part of the program may have made."""
        if storage in self._references:
            self.release(storage)
        elif not storage.persistent:
            self.steps[-1].deaths.append(storage)

    def references(self, storage: Storage) -> int:
        """How many references keep `storage` alive now."""
        return self._references.get(storage, 0)
