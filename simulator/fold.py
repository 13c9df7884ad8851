"""Folding: the peak of a program without unrolling it.

A part of a program is a pair (net, candidates): what it leaves allocated, and the candidates for
its peak. Both are linear forms, counts of storages per (role, size); they compose as a max-plus monoid:

    seq((n1, P1), (n2, P2))  =  (n1 + n2,  P1 | n1 + P2)
    repeat(k, (n, P))        =  (k n,      P | (k - 1) n + P)

so depth and number of micro-batches cost nothing. Bytes enter last, as ints, arrays or symbols.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from simulator.graph import Storage
from simulator.program import Leaf, Node, Repeat, Seq, Step, Walk
from simulator.roles import Role
from simulator.sizes import AnySize, Bindings, Value

Counts = npt.NDArray[np.int64]
#: A column of a linear form.
Column = tuple[Role, AnySize]


@attrs.frozen(eq=False)
class Location:
    """The step of a candidate and, from the outside in, the iteration of each repeat around it."""

    step: Step
    iterations: tuple[int, ...] = ()


@attrs.frozen(eq=False)
class Folded:
    """A folded program part: `net` counts per column, and what tells the bytes of each possible peak."""

    columns: tuple[Column, ...]
    net: Counts
    start: Counts
    """What is allocated before the part runs."""
    rows: _Rows

    def after(self, net: Counts) -> Folded:
        """The same part, starting from what `net` has left allocated."""
        return attrs.evolve(self, net=self.net + net, start=self.start + net)

    def prices(self, bindings: Bindings) -> list[Value]:
        """Allocated bytes of one storage per column."""
        known: dict[AnySize, Value] = {}
        for _, size in self.columns:
            if size not in known:
                known[size] = size.allocated(bindings)
        return [known[size] for _, size in self.columns]

    def bytes(self, prices: list[Value]) -> Any:
        """Bytes of every candidate at `prices`.

        One row per candidate: an int64 array for ints (of Python ints where 64 bits are too few), one with the
        broadcast shape of the arrays behind it for arrays, an object array of expressions for symbols.
        """
        if any(hasattr(price, "free_symbols") for price in prices):
            stacked = np.array(prices, dtype=object)
        else:
            stacked = np.stack(np.broadcast_arrays(*prices))
            largest = int(stacked.max(initial=0)) * (int(np.abs(self.start).sum()) + self.rows.largest)
            if largest > np.iinfo(np.int64).max:  # numpy would wrap around in silence
                stacked = stacked.astype(object)
        return self.rows.bytes(stacked, {}) + _priced(self.start, stacked)

    def peak(self, prices: list[Value]) -> Peak:
        """The largest candidate for integer `prices`; the first one on a tie."""
        values = self.bytes(prices)
        index = int(np.argmax(values))
        location, counts = self.rows.candidate(index)
        return Peak(int(values[index]), location, self._by_role(_widen(counts, len(self.start)) + self.start, prices))

    def left(self, prices: list[Value]) -> int:
        """Bytes left allocated at the end."""
        return int(_dot(self.net.tolist(), prices))

    def _by_role(self, row: Counts, prices: list[Value]) -> dict[Role, int]:
        roles: dict[Role, int] = {}
        for (role, _), count, price in zip(self.columns, row.tolist(), prices, strict=True):
            if count:
                roles[role] = roles.get(role, 0) + count * price
        return roles


@attrs.frozen
class Peak:
    """The most bytes allocated at once, where, and for what."""

    nbytes: int
    location: Location
    by_role: dict[Role, int]


def _dot(counts: Iterable[int], prices: list[Value]) -> Value:
    return sum((count * price for count, price in zip(counts, prices, strict=True) if count), 0)


@attrs.frozen(eq=False)
class _Straight:
    """A straight run: `table` has one row per candidate."""

    net: Counts
    table: Counts
    steps: tuple[Step, ...]
    """The step of each candidate."""

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def largest(self) -> int:
        """No candidate counts more storages, allocated and freed ones together."""
        return int(np.abs(self.table).sum(axis=1).max(initial=0))

    def bytes(self, prices: Any, known: dict[int, Any]) -> Any:
        """Bytes of every candidate; `known` has those of parts priced before."""
        found = known.get(id(self))
        if found is None:
            found = known[id(self)] = _priced(self.table, prices)
        return found

    def candidate(self, index: int) -> tuple[Location, Counts]:
        """Where a candidate is, and its counts."""
        return Location(self.steps[index]), self.table[index]


@attrs.frozen(eq=False)
class _Joined:
    """Parts one after the other, each with what is allocated before it; of repeats, those that may have the peak."""

    net: Counts
    parts: tuple[_Rows, ...]
    starts: Counts
    """One row per part."""
    iterations: tuple[int, ...] = ()
    """Of a repeat, the iteration of each part."""

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @property
    def largest(self) -> int:
        """No candidate counts more storages, allocated and freed ones together."""
        sums: list[int] = np.abs(self.starts).sum(axis=1).tolist()
        return max([0, *(before + part.largest for before, part in zip(sums, self.parts, strict=True))])

    def bytes(self, prices: Any, known: dict[int, Any]) -> Any:
        """Bytes of every candidate; `known` has those of parts priced before."""
        found = known.get(id(self))
        if found is None:
            starts = _priced(self.starts, prices)
            priced = [part.bytes(prices, known) + start for part, start in zip(self.parts, starts, strict=True)]
            nothing = np.zeros((0, *prices.shape[1:]), dtype=prices.dtype)
            found = known[id(self)] = np.concatenate([nothing, *priced])
        return found

    def candidate(self, index: int) -> tuple[Location, Counts]:
        """Where a candidate is, and its counts."""
        for number, part in enumerate(self.parts):
            if index < len(part):
                location, counts = part.candidate(index)
                if self.iterations:
                    location = Location(location.step, (self.iterations[number], *location.iterations))
                return location, _widen(counts, self.starts.shape[1]) + self.starts[number]
            index -= len(part)
        raise AssertionError("no such candidate")


_Rows = _Straight | _Joined


class Folder:
    """Folds the parts of one program over one set of columns, each distinct part once."""

    def __init__(self) -> None:
        self._index: dict[Column, int] = {}
        self._columns: dict[Storage, int] = {}
        self._rows: dict[Node, _Rows] = {}

    def fold(self, node: Node) -> Folded:
        """The folded form of `node`; columns cover everything this folder has seen so far."""
        rows = self._fold(node)
        net = _widen(rows.net, len(self._index))
        return Folded(tuple(self._index), net, np.zeros_like(net), rows)

    def _fold(self, node: Node) -> _Rows:
        known = self._rows.get(node)
        if known is None:
            known = self._rows[node] = self._fold_leaf(node) if isinstance(node, Leaf) else self._fold_inner(node)
        return known

    def _fold_inner(self, node: Seq | Repeat | Walk) -> _Rows:
        if isinstance(node, Repeat):
            return _repeat(self._fold(node.body), node.count)
        if isinstance(node, Seq):
            return _sequence([self._fold(part) for part in node.parts], len(self._index))
        return _walk([self._fold(leaf) for leaf, _ in node.parts], len(self._index))

    def _fold_leaf(self, leaf: Leaf) -> _Straight:
        """One candidate per step after whose births something dies before anything else is born."""
        born: list[tuple[int, int]] = []
        died: list[tuple[int, int]] = []
        peaks: list[Step] = []
        rising: Step | None = None
        for step in leaf.steps:
            births, deaths = step.recorded.births, step.recorded.deaths
            if births:
                rising = step
                born += [(len(peaks), self._column(storage)) for storage in births]
            if deaths:
                if rising is not None:
                    peaks.append(rising)
                    rising = None
                died += [(len(peaks), self._column(storage)) for storage in deaths]
        if rising is not None:
            peaks.append(rising)
        shape = (len(peaks) + 1, len(self._index))
        live = np.cumsum(_counts(born, shape) - _counts(died, shape), axis=0)
        return _Straight(live[-1], live[:-1], tuple(peaks))

    def _column(self, storage: Storage) -> int:
        column = self._columns.get(storage)
        if column is None:
            column = self._index.setdefault((storage.role, storage.size), len(self._index))
            self._columns[storage] = column
        return column


def _counts(found: list[tuple[int, int]], shape: tuple[int, int]) -> Counts:
    """How often each (row, column) occurs."""
    rows, width = shape
    flat = np.array([row * width + column for row, column in found], dtype=np.int64)
    return np.bincount(flat, minlength=rows * width).reshape(shape)


def _widen(rows: Counts, width: int) -> Counts:
    """The same rows with zeros for the columns that came later."""
    if rows.shape[-1] == width:
        return rows
    wide = np.zeros((*rows.shape[:-1], width), dtype=np.int64)
    wide[..., : rows.shape[-1]] = rows
    return wide


def _priced(counts: Counts, prices: Any) -> Any:
    """Bytes of each row of `counts` (or of the one there is), whose last columns may be missing."""
    return np.tensordot(counts, prices[: counts.shape[-1]], axes=1)


def _sequence(parts: list[_Rows], width: int) -> _Joined:
    starts = _starts(parts, width)
    return _Joined(starts[-1], tuple(parts), starts[:-1])


def _starts(parts: list[_Rows], width: int) -> Counts:
    """What is allocated before each part, and at the end."""
    starts = np.zeros((len(parts) + 1, width), dtype=np.int64)
    for index, part in enumerate(parts):
        starts[index + 1, : len(part.net)] = part.net
    return np.cumsum(starts, axis=0, out=starts)


def _walk(parts: list[_Rows], width: int) -> _Joined:
    starts = _starts(parts, width)
    return _Joined(starts[-1], tuple(parts), starts[:-1], tuple(range(len(parts))))


def _repeat(body: _Rows, count: int) -> _Joined:
    """First and last iteration; one of them is enough when the net only grows or only shrinks."""
    if count == 0:
        iterations: tuple[int, ...] = ()
    elif count == 1 or (body.net <= 0).all():
        iterations = (0,)
    else:
        iterations = (count - 1,) if (body.net >= 0).all() else (0, count - 1)
    starts = np.array(iterations, dtype=np.int64)[:, None] * body.net
    return _Joined(count * body.net, (body,) * len(iterations), starts, iterations)
