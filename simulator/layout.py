"""How a list of layers repeats: long models are built from a few turns of each pattern.

A pattern that repeats k times is built as its first, one middle and its last turn; the middle
turn then stands for k - 2 of them. So cost does not grow with depth, nothing at a boundary is
special-cased, and alternating stacks (sliding / full attention) work like uniform ones.
Where a layer's steps reach r layers away (prefetching), r turns are built at each end.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import attrs

from simulator.model import LayerSpec

#: Longest pattern looked for; real models alternate with periods up to 8 (Jamba: 8 layers).
LONGEST_PERIOD = 16


@attrs.frozen
class Run:
    """`count` turns of a pattern of `period` layers, from layer `start`; built from slot `first_slot` on."""

    start: int
    period: int
    count: int
    first_slot: int
    reach: int = 1
    """How many turns away the steps of one turn may reach: so many are built at each end."""

    @property
    def built(self) -> int:
        """How many turns are built: those at the ends and one for all between them."""
        return min(self.count, 2 * self.reach + 1)

    @property
    def hidden_turns(self) -> int:
        """Turns that the middle one stands for besides itself."""
        return self.count - self.built


@attrs.frozen
class Place:
    """Where a built slot belongs: its run, its turn in it, and its position in the pattern."""

    run: Run
    turn: int
    offset: int

    @property
    def repeats(self) -> int:
        """How many turns of the real model this built turn stands for."""
        return 1 + self.run.hidden_turns if self.turn == self.run.reach else 1

    @property
    def base(self) -> int:
        """Real index of the first layer of this turn (of its first repetition)."""
        hidden = self.run.hidden_turns if self.turn > self.run.reach else 0
        return self.run.start + (self.turn + hidden) * self.run.period


@attrs.frozen
class Layout:
    """The runs of a layer list and what slots are built for them."""

    runs: tuple[Run, ...]
    places: tuple[Place, ...]
    """One per built slot."""

    def slots(self) -> list[int]:
        """For every layer of the real model, the built slot that is it or stands for it."""
        found = []
        for run in self.runs:
            for turn in range(run.count):
                from_end = run.count - turn  # 1 for the last turn
                built = turn if turn <= run.reach else max(run.reach, run.built - from_end)
                found += [run.first_slot + built * run.period + offset for offset in range(run.period)]
        return found

    def built(self, layers: Sequence[LayerSpec]) -> list[tuple[int, LayerSpec]]:
        """Slot and spec of every layer to build."""
        return [(slot, layers[place.base + place.offset]) for slot, place in enumerate(self.places)]


def layout_of(layers: Sequence[Hashable], reach: int = 1) -> Layout:
    """Split a list of layers (or of whatever tells them apart) into runs, longest repetition first at each point."""
    kinds = _kinds(layers)
    runs: list[Run] = []
    places: list[Place] = []
    position = 0
    while position < len(kinds):
        period, count = _longest(kinds, position)
        run = Run(position, period, count, len(places), reach)
        runs.append(run)
        places += [Place(run, turn, offset) for turn in range(run.built) for offset in range(period)]
        position += period * count
    return Layout(tuple(runs), tuple(places))


def unrolled_layout(layers: Sequence[Hashable]) -> Layout:
    """The layout that builds every layer: what folding is checked against."""
    runs = tuple(Run(i, 1, 1, i, reach=len(layers)) for i in range(len(layers)))
    return Layout(runs, tuple(Place(run, 0, 0) for run in runs))


def _kinds(layers: Sequence[Hashable]) -> list[int]:
    """Equal layers get equal numbers, so that patterns are found on ints."""
    numbers: dict[Hashable, int] = {}
    by_identity: dict[int, int] = {}
    for layer in layers:
        if id(layer) not in by_identity:
            by_identity[id(layer)] = numbers.setdefault(layer, len(numbers))
    return [by_identity[id(layer)] for layer in layers]


def _longest(kinds: list[int], position: int) -> tuple[int, int]:
    """The period and count that cover most layers from `position` on; the shorter period wins a tie."""
    best = (1, 1)
    for period in range(1, min(LONGEST_PERIOD, (len(kinds) - position) // 2) + 1):
        count = _repetitions(kinds, position, period)
        if count > 1 and period * count > best[0] * best[1]:
            best = (period, count)
        if best[0] * best[1] == len(kinds) - position:
            break
    return best


def _repetitions(kinds: list[int], position: int, period: int) -> int:
    pattern = kinds[position : position + period]
    count = 1
    while kinds[position + count * period : position + (count + 1) * period] == pattern:
        count += 1
    return count
