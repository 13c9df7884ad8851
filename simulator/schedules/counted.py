"""Schedules written as turns of a pattern, whose micro-batches are counted per kind and chunk."""

from __future__ import annotations

from collections import Counter, deque
from itertools import pairwise

import attrs

from simulator.schedules.tree import Action, Kind, Leaf, Node, Repeat, Seq

#: What a pattern names: a kind and a chunk, and whether it starts together with the next.
Entry = tuple[Kind, int] | tuple[Kind, int, bool]


@attrs.define
class Turns:
    """Builds a tree; every entry takes the next micro-batch of its kind and chunk.

    A full backward counts as one for the inputs and one for the weights.

    Args:
        first: the first micro-batch of each chunk.
        end: no action is made for micro-batches from here on; their turns are left out.
    """

    first: tuple[int, ...]
    end: int | None = None
    _done: Counter[tuple[Kind, int]] = attrs.field(factory=Counter, init=False)
    _parts: list[Node] = attrs.field(factory=list, init=False)
    _waiting: deque[int] = attrs.field(factory=deque, init=False)

    def run(self, count: int, *pattern: Entry) -> None:
        """`count` turns of a pattern that names each kind and chunk at most once."""
        if count < 1:
            return
        actions = [self._next(count, *entry) for entry in pattern]
        for start, stop in pairwise(self._cuts(count, actions)):
            moved = [attrs.evolve(a, micro_batch=a.micro_batch + start) for a in actions]
            kept = tuple(a for a in moved if self.end is None or a.micro_batch < self.end)
            if kept:
                self._parts.append(Repeat(stop - start, Leaf(kept), 1))

    def postpone(self, count: int, *pattern: Entry) -> None:
        """Like `run`; the weights of each backward for inputs wait for `weights`, first come, first served."""
        self.run(count, *pattern)
        self._waiting.extend([entry[1] for entry in pattern if entry[0] is Kind.I] * max(count, 0))

    def weights(self, count: int, *after: Entry) -> None:
        """`count` times the weights that wait longest, each with what comes after them."""
        for _ in range(count):
            self.run(1, (Kind.W, self._waiting.popleft()))
            self.postpone(1, *after)

    def tree(self) -> Node:
        """All that was run."""
        return Seq(tuple(self._parts))

    def _next(self, count: int, kind: Kind, chunk: int, overlapped: bool = False) -> Action:
        counted = Kind.I if kind is Kind.B else kind
        action = Action(kind, chunk, self.first[chunk] + self._done[counted, chunk], overlapped)
        self._done[counted, chunk] += count
        if kind is Kind.B:
            self._done[Kind.W, chunk] += count
        return action

    def _cuts(self, count: int, actions: list[Action]) -> list[int]:
        """Turns at which an action's micro-batches run out, between the first and the end."""
        if self.end is None:
            return [0, count]
        left = {min(max(self.end - action.micro_batch, 0), count) for action in actions}
        return sorted({0, count, *left})
