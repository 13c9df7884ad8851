"""Folding: the peak of a program without unrolling it.

A part of a program is a pair (net, candidates): what it leaves allocated, and the candidates for
its peak. Both are linear forms, counts of storages per (role, size); they compose as a max-plus monoid:

    seq((n1, P1), (n2, P2))  =  (n1 + n2,  P1 | n1 + P2)
    repeat(k, (n, P))        =  (k n,      P | (k - 1) n + P)

so depth and number of micro-batches cost nothing. Bytes enter last, as ints, arrays or symbols.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from simulator.graph import Storage
from simulator.program import Leaf, Node, Occurrence, Repeat, Seq, Step, Walk
from simulator.roles import Role
from simulator.sizes import AnySize, Bindings, Value

Counts = npt.NDArray[np.int64]
#: A column of a linear form.
Column = tuple[Role, AnySize]


@attrs.frozen(eq=False)
class Location:
    """The step of a candidate and, from the outside in, the iteration of each repeat (number of each occurrence)."""

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

    def bytes(self, prices: list[Value], known: dict[int, Any] | None = None) -> Any:
        """Bytes of every candidate at `prices`.

        One row per candidate: an int64 array for ints (of Python ints where 64 bits are too few), one with the
        broadcast shape of the arrays behind it for arrays, an object array of expressions for symbols.

        Args:
            known: what parts of this program cost at these prices, found before; filled here.
        """
        stacked = self._stacked(prices)
        return self.rows.bytes(stacked, {} if known is None else known) + _priced(self.start, stacked)

    def _stacked(self, prices: list[Value]) -> Any:
        if any(hasattr(price, "free_symbols") for price in prices):
            return np.array(prices, dtype=object)
        stacked = np.stack(np.broadcast_arrays(*prices))
        largest = int(stacked.max(initial=0)) * (int(np.abs(self.start).sum()) + self.rows.largest)
        # numpy would wrap around in silence
        return stacked.astype(object) if largest > np.iinfo(np.int64).max else stacked

    def peak(self, prices: list[Value], known: dict[int, Any] | None = None) -> Peak:
        """The largest candidate for integer `prices`; the first one on a tie. See `bytes`."""
        stacked = self._stacked(prices)
        nbytes, index = self.rows.highest(stacked, {} if known is None else known)
        location, counts = self.rows.candidate(index)
        counts = _widen(counts, len(self.start)) + self.start
        return Peak(nbytes + int(_priced(self.start, stacked)), location, self._by_role(counts, prices))

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
    largest: int
    """No candidate counts more storages, allocated and freed ones together."""

    def __len__(self) -> int:
        return len(self.steps)

    def bytes(self, prices: Any, known: dict[int, Any]) -> Any:
        """Bytes of every candidate; `known` has those of parts priced before."""
        found = known.get(id(self))
        if found is None:
            found = known[id(self)] = _priced(self.table, prices)
        return found

    def highest(self, prices: Any, known: dict[int, Any]) -> tuple[int, int]:
        """Bytes and number of the candidate that needs the most at integer `prices`; the first one on a tie."""
        found = known.get(id(self))
        if found is None:
            values = _priced(self.table, prices)
            index = int(np.argmax(values))
            found = known[id(self)] = int(values[index]), index
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
    largest: int
    """No candidate counts more storages, allocated and freed ones together."""
    iterations: tuple[int, ...] = ()
    """Of a repeat, the iteration of each part."""

    _length: int = attrs.field(init=False)

    @_length.default
    def _count(self) -> int:
        return sum(map(len, self.parts))

    def __len__(self) -> int:
        return self._length

    def bytes(self, prices: Any, known: dict[int, Any]) -> Any:
        """Bytes of every candidate; `known` has those of parts priced before."""
        found = known.get(id(self))
        if found is None:
            starts = _priced(self.starts, prices)
            priced = [part.bytes(prices, known) + start for part, start in zip(self.parts, starts, strict=True)]
            nothing = np.zeros((0, *prices.shape[1:]), dtype=prices.dtype)
            found = known[id(self)] = np.concatenate([nothing, *priced])
        return found

    def highest(self, prices: Any, known: dict[int, Any]) -> tuple[int, int]:
        """Bytes and number of the candidate that needs the most at integer `prices`; the first one on a tie."""
        found = known.get(id(self))
        if found is None:
            starts, before, ways = _priced(self.starts, prices).tolist(), 0, []
            for part, start in zip(self.parts, starts, strict=True):
                if len(part):
                    nbytes, index = part.highest(prices, known)
                    ways.append((nbytes + start, before + index))
                before += len(part)
            found = known[id(self)] = max(ways, key=itemgetter(0))
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

    def _fold_inner(self, node: Seq | Repeat | Walk | Occurrence) -> _Rows:
        if isinstance(node, Repeat):
            return _repeat(self._fold(node.body), node.count)
        if isinstance(node, Occurrence):
            body = self._fold(node.body)
            return _sequence([body], len(self._index), (node.number,))
        if isinstance(node, Seq):
            return _sequence([self._fold(part) for part in node.parts], len(self._index))
        bodies = [self._fold(leaf) for leaf, _ in node.parts]
        return _sequence(bodies, len(self._index), tuple(range(len(bodies))))

    def _fold_leaf(self, leaf: Leaf) -> _Straight:
        """One candidate per step after whose births something dies before anything else is born."""
        born: list[Storage] = []
        died: list[Storage] = []
        rows: tuple[list[int], list[int]] = ([], [])
        peaks: list[Step] = []
        rising: Step | None = None
        for step in leaf.steps:
            births, deaths = step.recorded.births, step.recorded.deaths
            if births:
                rising = step
                born += births
                rows[0].extend([len(peaks)] * len(births))
            if deaths:
                if rising is not None:
                    peaks.append(rising)
                    rising = None
                died += deaths
                rows[1].extend([len(peaks)] * len(deaths))
        if rising is not None:
            peaks.append(rising)
        columns = np.array(self._numbered(born + died), dtype=np.int64)
        height, width = len(peaks) + 1, len(self._index)
        changes = np.repeat((1.0, -1.0), (len(born), len(died)))  # exact: no count comes near 2**53
        places = np.array(rows[0] + rows[1], dtype=np.int64) * width + columns
        table = np.bincount(places, changes, height * width).reshape(height, width)
        live = table.cumsum(axis=0).astype(np.int64)
        return _Straight(live[-1], live[:-1], tuple(peaks), len(born) + len(died))

    def _numbered(self, storages: list[Storage]) -> list[int]:
        """The column of each storage."""
        known = self._columns
        return [known[storage] if storage in known else self._column(storage) for storage in storages]

    def _column(self, storage: Storage) -> int:
        column = self._index.setdefault((storage.role, storage.size), len(self._index))
        self._columns[storage] = column
        return column


def _widen(rows: Counts, width: int) -> Counts:
    """The same rows with zeros for the columns that came later."""
    if rows.shape[-1] == width:
        return rows
    wide = np.zeros((*rows.shape[:-1], width), dtype=np.int64)
    wide[..., : rows.shape[-1]] = rows
    return wide


def _priced(counts: Counts, prices: Any) -> Any:
    """Bytes of each row of `counts` (or of the one there is), whose last columns may be missing."""
    among = prices[: counts.shape[-1]]
    return counts.dot(among) if among.ndim == 1 else np.tensordot(counts, among, axes=1)


def _sequence(parts: Sequence[_Rows], width: int, iterations: tuple[int, ...] = ()) -> _Joined:
    starts = np.zeros((len(parts) + 1, width), dtype=np.int64)
    for index, part in enumerate(parts):
        starts[index + 1, : len(part.net)] = part.net
    np.cumsum(starts, axis=0, out=starts)
    return _joined(starts[-1], parts, starts[:-1], iterations)


def _joined(net: Counts, parts: Sequence[_Rows], starts: Counts, iterations: tuple[int, ...]) -> _Joined:
    before: list[int] = np.abs(starts).sum(axis=1).tolist()
    largest = max([0, *(count + part.largest for count, part in zip(before, parts, strict=True))])
    return _Joined(net, tuple(parts), starts, largest, iterations)


def _repeat(body: _Rows, count: int) -> _Joined:
    """First and last iteration; one of them is enough when the net only grows or only shrinks."""
    if count == 1:
        return _Joined(body.net, (body,), np.zeros((1, len(body.net)), dtype=np.int64), body.largest, (0,))
    if count == 0:
        iterations: tuple[int, ...] = ()
    elif (body.net <= 0).all():
        iterations = (0,)
    else:
        iterations = (count - 1,) if (body.net >= 0).all() else (0, count - 1)
    starts = np.array(iterations, dtype=np.int64)[:, None] * body.net
    return _joined(count * body.net, (body,) * len(iterations), starts, iterations)
