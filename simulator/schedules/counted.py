"""Schedules written as turns of a pattern, whose micro-batches are counted per kind and chunk."""

from __future__ import annotations

from collections import deque
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
    _next: list[list[int]] = attrs.field(init=False)
    _parts: list[Node] = attrs.field(factory=list, init=False)
    _waiting: deque[int] = attrs.field(factory=deque, init=False)

    def __attrs_post_init__(self) -> None:
        self._next = [list(self.first) for _ in Kind]

    def run(self, count: int, *pattern: Entry) -> None:
        """`count` turns of a pattern that names each kind and chunk at most once."""
        if count < 1:
            return
        actions = [self._take(count, *entry) for entry in pattern]
        for start, stop in pairwise(self._cuts(count, actions)):
            kept = self._kept(actions, start)
            if kept:
                self._append(stop - start, kept)

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

    def _take(self, count: int, kind: Kind, chunk: int, overlapped: bool = False) -> Action:
        following = self._next[Kind.I if kind is Kind.B else kind]
        action = Action(kind, chunk, following[chunk], overlapped)
        following[chunk] += count
        if kind is Kind.B:
            self._next[Kind.W][chunk] += count
        return action

    def _append(self, count: int, actions: tuple[Action, ...]) -> None:
        """Turns of their own; single ones are one straight run with what went before."""
        before = self._parts[-1] if self._parts else None
        if count > 1:
            self._parts.append(Repeat(count, Leaf(actions), 1))
        elif isinstance(before, Leaf):
            self._parts[-1] = Leaf(before.actions + actions)
        else:
            self._parts.append(Leaf(actions))

    def _kept(self, actions: list[Action], start: int) -> tuple[Action, ...]:
        """The actions of a turn, `start` turns on, but for micro-batches that are not there."""
        if start:
            actions = [attrs.evolve(a, micro_batch=a.micro_batch + start) for a in actions]
        return tuple(actions if self.end is None else [a for a in actions if a.micro_batch < self.end])

    def _cuts(self, count: int, actions: list[Action]) -> list[int]:
        """Turns at which an action's micro-batches run out, between the first and the end."""
        if self.end is None:
            return [0, count]
        left = {self.end - action.micro_batch for action in actions}
        return [0, *sorted(turn for turn in left if 0 < turn < count), count]
