"""What a loop in Python holds from one part of a program to the next: variables, and what they are bound to."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import attrs

from simulator.graph import Storage


@attrs.define(eq=False)
class Thing:
    """A tensor as Python sees it: it goes with the last variable, list or other thing that holds it."""

    storages: list[Storage]
    others: list[Thing] = attrs.field(factory=list)
    """What it keeps alive: a tensor its gradient, and through its graph the leaves that the graph began with."""
    holders: int = 0


class Variables:
    """Variables bound to things.

    Args:
        free: called with each storage whose last holder is gone.
    """

    def __init__(self, free: Callable[[Storage], None]) -> None:
        self._free = free
        self._bound: dict[Hashable, Thing] = {}

    def bind(self, name: Hashable, thing: Thing | None) -> None:
        """``name = thing``: what the variable was bound to goes once the new one is there."""
        if thing is not None:
            self.hold(thing)
        old = self._bound.pop(name, None)
        if thing is not None:
            self._bound[name] = thing
        if old is not None:
            self.release(old)

    def drop(self, *names: Hashable) -> None:
        """Variables go out of scope."""
        for name in names:
            self.bind(name, None)

    def bound(self, name: Hashable) -> Thing | None:
        """What variable `name` is bound to."""
        return self._bound.get(name)

    @staticmethod
    def hold(thing: Thing) -> None:
        """One more holder: a list, say."""
        thing.holders += 1

    def release(self, thing: Thing) -> None:
        """One holder less; the last one frees the thing, and lets go of what it keeps alive."""
        thing.holders -= 1
        if thing.holders:
            return
        for storage in thing.storages:
            self._free(storage)
        for other in thing.others:
            self.release(other)

    def keep(self, thing: Thing, other: Thing) -> None:
        """From now on `thing` keeps `other` alive."""
        self.hold(other)
        thing.others.append(other)

    def replace(self, thing: Thing, storage: Storage) -> None:
        """``thing.data = ...``: its old memory goes."""
        old, thing.storages = thing.storages, [storage]
        for each in old:
            self._free(each)


class HeldList:
    """A list that holds what is in it; nothing, too, has a place in it."""

    def __init__(self, variables: Variables) -> None:
        self._variables = variables
        self._items: list[Thing | None] = []
        self._popped = 0

    def __len__(self) -> int:
        return len(self._items)

    def append(self, item: Thing | None) -> None:
        """``list.append(item)``."""
        if item is not None:
            self._variables.hold(item)
        self._items.append(item)

    def at(self, index: int) -> Thing | None:
        """The item that was appended as the `index`-th."""
        return self._items[index - self._popped]

    def pop_into(self, name: str) -> Thing | None:
        """``name = list.pop(0)``."""
        item = self._items.pop(0)
        self._popped += 1
        self._variables.bind(name, item)
        if item is not None:
            self._variables.release(item)
        return item
