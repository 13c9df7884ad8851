"""Schedules in which one sequence of (chunk, micro-batch) is run forward, and again, some turns later, backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import attrs

from simulator.schedules.tree import Action, Kind, Leaf, Node, Repeat, Seq


@attrs.frozen
class Rounds:
    """Micro-batches in groups, each through all chunks before the next group starts; the last may differ.

    Megatron-LM's schedule table (``megatron/core/pipeline_parallel/schedules.py``, ``get_schedule_table``); with
    one chunk it is the micro-batches one after the other.
    """

    micro_batches: int
    chunks: int
    group: int

    @property
    def length(self) -> int:
        """How many pairs of chunk and micro-batch there are."""
        return self.micro_batches * self.chunks

    @property
    def period(self) -> int:
        """Pairs after which the chunks come round again, with micro-batches `group` further on."""
        return self.group * self.chunks

    @property
    def regular(self) -> int:
        """Pairs in groups of full size."""
        return self.micro_batches // self.group * self.period

    def at(self, index: int) -> tuple[int, int, int]:
        """Chunk and micro-batch of a pair, and how many pairs from it on have that chunk, group and one step."""
        turn, inside = divmod(index, self.period)
        first = turn * self.group
        width = min(self.group, self.micro_batches - first)
        chunk, offset = divmod(inside, width)
        return chunk, first + offset, width - offset


@attrs.frozen
class Lane:
    """One kind of action on every pair of the rounds: pair i at turn ``start + i``."""

    kind: Kind
    start: int

    def action(self, rounds: Rounds, turn: int) -> tuple[Action, int]:
        """The action at a turn, and for how many turns it goes on with the next micro-batch each."""
        chunk, micro_batch, alike = rounds.at(turn - self.start)
        # Backward takes the chunks last to first.
        chunk = chunk if self.kind is Kind.F else rounds.chunks - 1 - chunk
        return Action(self.kind, chunk, micro_batch), alike


def lockstep(rounds: Rounds, lanes: Sequence[Lane]) -> Node:
    """Turn by turn, one action of each lane that has begun and is not over, in the order of the lanes."""
    cuts = {turn for lane in lanes for turn in (lane.start, lane.start + rounds.regular, lane.start + rounds.length)}
    turns = sorted(cuts)
    parts: list[Node] = []
    for first, end in pairwise(turns):
        running = [lane for lane in lanes if lane.start <= first < lane.start + rounds.length]
        parts += _phase(rounds, running, first, end)
    return Seq(tuple(parts))


def _phase(rounds: Rounds, lanes: Sequence[Lane], first: int, end: int) -> list[Node]:
    """Turns in which the same lanes run, all in groups of full size or not: whole periods are one `Repeat`."""
    if not lanes:
        return []
    regular = all(first < lane.start + rounds.regular for lane in lanes)
    periods = (end - first) // rounds.period if regular else 0
    if periods < 2:
        return list(_runs(rounds, lanes, first, end))
    middle = first + rounds.period
    period = Seq(tuple(_runs(rounds, lanes, first, middle)))
    rest = _runs(rounds, lanes, first + periods * rounds.period, end)
    return [Repeat(periods, period, rounds.group), *rest]


def _runs(rounds: Rounds, lanes: Sequence[Lane], first: int, end: int) -> Iterator[Node]:
    """Turns as runs in which every lane stays on its chunk."""
    while first < end:
        actions, alike = zip(*[lane.action(rounds, first) for lane in lanes], strict=True)
        count = min(*alike, end - first)
        yield Repeat(count, Leaf(actions), 1) if count > 1 else Leaf(actions)
        first += count
