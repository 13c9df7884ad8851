"""One registry class for every plug-in point: a decorator inside, entry points outside."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from hardware.errors import unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects of one kind; third parties join through the entry-point `group`.

    Entry points are only loaded when a name is missing or all names are asked for, so that
    a plug-in costs nothing to those who do not use it. A plug-in that fails to load, or that
    takes a name that exists, is skipped with a warning that names it. `builtin` gives our own
    items where they are not decorated but read from a table; it is called once, at first use.
    """

    def __init__(self, kind: str, group: str, builtin: Callable[[], Mapping[str, T]] | None = None) -> None:
        self.kind = kind
        self.group = group
        self._builtin = builtin
        self._items: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator: ``@families.register("llama")``; a taken name raises `ValueError`."""

        def add(item: T) -> T:
            self.add(name, item)
            return item

        return add

    def add(self, name: str, item: T) -> None:
        """Put `item` under `name`; a taken name raises `ValueError`."""
        self._fill()
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered already; choose another name")
        self._items[name] = item

    def get(self, name: str) -> T:
        """The object called `name`; `UsageError` with the nearest names otherwise."""
        self._fill()
        if name not in self._items:
            self._discover()
        if name not in self._items:
            raise unknown_name(self.kind, name, self._items)
        return self._items[name]

    def names(self) -> list[str]:
        """Every known name, sorted."""
        self._discover()
        return sorted(self._items)

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._items or name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def _fill(self) -> None:
        if self._builtin is not None:
            builtin, self._builtin = self._builtin, None
            self._items.update(builtin())

    def _discover(self) -> None:
        self._fill()
        if self._discovered:
            return
        self._discovered = True
        # Imported here: most runs need no plug-in, and this costs more than the rest of the module.
        from importlib.metadata import entry_points

        for point in entry_points(group=self.group):
            self._load(point.name, point.load)

    def _load(self, name: str, load: Callable[[], T]) -> None:
        try:
            item = load()
        except Exception as error:  # a broken plug-in must not take the command down with it
            warnings.warn(f"{self.kind} plug-in {name!r} failed to load and is skipped: {error}", stacklevel=2)
            return
        if name not in self._items:
            self._items[name] = item
        elif self._items[name] is not item:
            text = f"{self.kind} plug-in {name!r} hides behind one of the same name and is skipped"
            warnings.warn(text, stacklevel=2)
