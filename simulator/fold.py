"""Folding: the peak of a program without unrolling it.

A part of a program is a pair (net, candidates): what it leaves allocated, and the candidates for
its peak. Both are linear forms, counts of storages per (role, size); they compose as a max-plus monoid:

    seq((n1, P1), (n2, P2))  =  (n1 + n2,  P1 | n1 + P2)
    repeat(k, (n, P))        =  (k n,      P | (k - 1) n + P)

so depth and number of micro-batches cost nothing. Bytes enter last, as ints, arrays or symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from simulator.graph import Storage
from simulator.program import Leaf, Node, Occurrence, Repeat, Seq, Step
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
    """A folded program part: `net` counts per column, one row of `candidates` per possible peak."""

    columns: tuple[Column, ...]
    net: Counts
    candidates: Counts
    locate: Callable[[int], Location]
    """Where a candidate is."""

    def after(self, net: Counts) -> Folded:
        """The same part, starting from what `net` has left allocated."""
        return attrs.evolve(self, net=self.net + net, candidates=self.candidates + net)

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
            return np.array([_dot(row, prices) for row in self.candidates.tolist()], dtype=object)
        stacked = np.stack(np.broadcast_arrays(*prices))
        largest = int(stacked.max(initial=0)) * int(np.abs(self.candidates).sum(axis=1).max(initial=0))
        if largest > np.iinfo(np.int64).max:  # numpy would wrap around in silence
            return np.tensordot(self.candidates.astype(object), stacked.astype(object), axes=1)
        return np.tensordot(self.candidates, stacked, axes=1)

    def peak(self, prices: list[Value]) -> Peak:
        """The largest candidate for integer `prices`; the first one on a tie."""
        values = self.bytes(prices)
        index = int(np.argmax(values))
        return Peak(int(values[index]), self.locate(index), self._by_role(self.candidates[index], prices))

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


class Folder:
    """Folds the parts of one program over one set of columns, each distinct part once."""

    def __init__(self) -> None:
        self._index: dict[Column, int] = {}
        self._columns: dict[Storage, int] = {}
        self._rows: dict[Node, _Rows] = {}

    def fold(self, node: Node) -> Folded:
        """The folded form of `node`; columns cover everything this folder has seen so far."""
        rows = self._fold(node)
        width = len(self._index)
        return Folded(tuple(self._index), _widen(rows.net, width), _widen(rows.candidates, width), rows.locate)

    def _fold(self, node: Node) -> _Rows:
        known = self._rows.get(node)
        if known is None:
            known = self._fold_leaf(node) if isinstance(node, Leaf) else self._fold_inner(node)
            self._rows[node] = known
        return known

    def _fold_inner(self, node: Seq | Repeat | Occurrence) -> _Rows:
        if isinstance(node, Occurrence):
            body = self._fold(node.body)
            return _Rows(body.net, body.candidates, _in_iteration(body, node.number))
        if isinstance(node, Seq):
            return _sequence([self._fold(part) for part in node.parts], len(self._index))
        return _repeat(self._fold(node.body), node.count)

    def _fold_leaf(self, leaf: Leaf) -> _Rows:
        births = [[self._column(r.storage) for r in step.births] for step in leaf.steps]
        deaths = [[self._column(r.storage) for r in step.deaths] for step in leaf.steps]
        width = len(self._index)
        born, died = _counts(births, width), _counts(deaths, width)
        after = np.cumsum(born - died, axis=0)
        kept = _local_peaks(births, deaths)
        return _Rows(after[-1], (after + died)[kept], lambda index: Location(leaf.steps[kept[index]]))

    def _column(self, storage: Storage) -> int:
        column = self._columns.get(storage)
        if column is None:
            column = self._index.setdefault((storage.role, storage.size), len(self._index))
            self._columns[storage] = column
        return column


@attrs.frozen(eq=False)
class _Rows:
    net: Counts
    candidates: Counts
    locate: Callable[[int], Location]


def _counts(columns: list[list[int]], width: int) -> Counts:
    """How often each column occurs in each row."""
    flat = [row * width + column for row, found in enumerate(columns) for column in found]
    counts = np.bincount(np.array(flat, dtype=np.int64), minlength=len(columns) * width)
    return counts.reshape(len(columns), width)


def _local_peaks(births: list[list[int]], deaths: list[list[int]]) -> list[int]:
    """Steps after whose births something dies before anything else is born: the others cannot be a peak."""
    kept = []
    rising = -1
    for index, (born, died) in enumerate(zip(births, deaths, strict=True)):
        if born:
            rising = index
        if died and rising >= 0:
            kept.append(rising)
            rising = -1
    return kept + ([rising] if rising >= 0 else [])


def _widen(rows: Counts, width: int) -> Counts:
    """The same rows with zeros for the columns that came later."""
    if rows.shape[-1] == width:
        return rows
    wide = np.zeros((*rows.shape[:-1], width), dtype=np.int64)
    wide[..., : rows.shape[-1]] = rows
    return wide


def _sequence(parts: list[_Rows], width: int) -> _Rows:
    net = np.zeros(width, dtype=np.int64)
    candidates = [np.zeros((0, width), dtype=np.int64)]
    for part in parts:
        candidates.append(_widen(part.candidates, width) + net)
        net = net + _widen(part.net, width)
    return _Rows(net, np.concatenate(candidates), lambda index: _locate_in(parts, index))


def _locate_in(parts: list[_Rows], index: int) -> Location:
    for part in parts:
        if index < len(part.candidates):
            return part.locate(index)
        index -= len(part.candidates)
    raise AssertionError("no such candidate")


def _repeat(body: _Rows, count: int) -> _Rows:
    """First and last iteration; one of them is enough when the net only grows or only shrinks."""
    net = count * body.net
    if count == 0:
        return _Rows(net, body.candidates[:0], body.locate)
    first = _Rows(net, body.candidates, _in_iteration(body, 0))
    if count == 1 or (body.net <= 0).all():
        return first
    last = _Rows(net, body.candidates + (count - 1) * body.net, _in_iteration(body, count - 1))
    if (body.net >= 0).all():
        return last
    both = np.concatenate([first.candidates, last.candidates])
    return _Rows(net, both, lambda index: _locate_in([first, last], index))


def _in_iteration(body: _Rows, iteration: int) -> Callable[[int], Location]:
    def locate(index: int) -> Location:
        at = body.locate(index)
        return Location(at.step, (iteration, *at.iterations))

    return locate
