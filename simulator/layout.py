"""How a list of layers repeats: long models are built from a few turns of each pattern.

A pattern that repeats k times is built as its first, one middle and its last turn; the middle
turn then stands for k - 2 of them. So cost does not grow with depth, nothing at a boundary is
special-cased, and alternating stacks (sliding / full attention) work like uniform ones.
Where a layer's steps reach r layers away (prefetching), r turns are built at each end.

Where nothing but hidden states and their gradients pass between layers, each kind of layer is built
once: it stands for all others of its kind, wherever they are.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from functools import cached_property

import attrs

from simulator.model import LayerSpec

#: Longest pattern looked for; real models alternate with periods up to 8 (Jamba: 8 layers).
LONGEST_PERIOD = 16


class Sharing(enum.Enum):
    """For which layers one that is built may stand: each asks for less to be alike than the one after it."""

    TURNS = "those in the middle of a pattern that repeats"
    LATER = "those of its kind, but for the first of each"
    REST = "those of its kind, but for the first of all"
    ALL = "those of its kind"


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
    others: tuple[int, ...] = ()
    """Real layers that it stands for besides, where these do not follow one another."""

    @property
    def last(self) -> int:
        """Real index of the last layer that it is or stands for, where these do not follow one another."""
        return max(self.base, *self.others) if self.others else self.base

    @property
    def repeats(self) -> int:
        """How many turns of the real model this built turn stands for."""
        hidden = self.run.hidden_turns if self.turn == self.run.reach else 0
        return 1 + hidden + len(self.others)

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

    @cached_property
    def scattered(self) -> bool:
        """Whether built layers stand for others here and there."""
        return any(place.others for place in self.places)

    def slots(self) -> list[int]:
        """For every layer of the real model, the built slot that is it or stands for it."""
        return self._slots

    @cached_property
    def _slots(self) -> list[int]:
        if self.scattered:
            own = {layer: slot for slot, place in enumerate(self.places) for layer in (place.base, *place.others)}
            return [own[layer] for layer in range(len(own))]
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


def layout_of(layers: Sequence[Hashable], reach: int = 1, together: int = 1) -> Layout:
    """Split a list of layers (or of whatever tells them apart) into runs, so that the fewest layers are built.

    Args:
        together: how many layers, counted from the first, no run may part from one another.
    """
    kinds = numbered(layers)
    groups = [tuple(kinds[start : start + together]) for start in range(0, len(kinds), together)]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    runs: list[Run] = []
    places: list[Place] = []
    position = first = 0
    for width, count in _cut([numbers[group] for group in groups], 2 * reach + 1):
        period = sum(map(len, groups[first : first + width]))
        run = Run(position, period, count, len(places), reach)
        runs.append(run)
        places += [Place(run, turn, offset) for turn in range(run.built) for offset in range(period)]
        position += period * count
        first += width * count
    return Layout(tuple(runs), tuple(places))


def layout_by_kind(layers: Sequence[Hashable], sharing: Sharing = Sharing.ALL) -> Layout:
    """The layout in which one layer stands for others of its kind, wherever these are.

    The kind of the last layer is built last, so that what follows the stack finds it where it is. The first of a kind
    is built by itself where its backward frees what they share (a mask).
    """
    kinds = numbered(layers)
    firsts = list(dict.fromkeys(map(kinds.index, kinds)))
    few = len(firsts) < 2  # passes over layers of one kind could not be told apart
    alone = {Sharing.LATER: firsts, Sharing.REST: firsts[:1], Sharing.ALL: firsts[:1] if few else []}[sharing]
    rest = sorted(set(range(len(kinds))) - set(alone), key=lambda layer: (kinds[layer] == kinds[-1], layer))
    alike: dict[int, list[int]] = {}
    for layer in rest:
        alike.setdefault(kinds[layer], []).append(layer)
    built = [[layer] for layer in alone] + list(alike.values())
    if len(built) == len(kinds):
        return unrolled_layout(kinds)
    if sharing is Sharing.ALL:  # the first layer must be built first
        built.sort(key=lambda layers: layers[0] != 0)
    runs = tuple(Run(layer, 1, 1, slot) for slot, (layer, *_) in enumerate(built))
    places = tuple(Place(run, 0, 0, tuple(like)) for run, (_, *like) in zip(runs, built, strict=True))
    return Layout(runs, places)


def unrolled_layout(layers: Sequence[Hashable]) -> Layout:
    """The layout that builds every layer: what folding is checked against."""
    runs = tuple(Run(i, 1, 1, i, reach=len(layers)) for i in range(len(layers)))
    return Layout(runs, tuple(Place(run, 0, 0) for run in runs))


def numbered(layers: Sequence[Hashable]) -> list[int]:
    """Equal layers get equal numbers, so that patterns are found on ints."""
    numbers: dict[Hashable, int] = {}
    by_identity: dict[int, int] = {}
    for layer in layers:
        if id(layer) not in by_identity:
            by_identity[id(layer)] = numbers.setdefault(layer, len(numbers))
    return [by_identity[id(layer)] for layer in layers]


def _cut(kinds: list[int], turns: int) -> list[tuple[int, int]]:
    """Period and count of each run; of a run at most `turns` turns are built.

    From the last layer to the first: the run that leaves the fewest to build, the longer and then the one of the
    shorter period where several do.
    """
    total = len(kinds)
    if len(set(kinds)) == 1:
        return [(1, total)]
    counts = [_counts(kinds, period) for period in range(1, min(LONGEST_PERIOD, total) + 1)]
    fewest = [0] * (total + 1)
    chosen = [(1, 1)] * total
    for position in reversed(range(total)):
        ways = []
        for period, count in enumerate(counts[: total - position], start=1):
            turns_here = count[position]
            if turns_here > 1 or period == 1:
                length = period * turns_here
                built = period * min(turns_here, turns) + fewest[position + length]
                ways.append((built, -length, period, turns_here))
        fewest[position], _, *run = min(ways)
        chosen[position] = run[0], run[1]
    runs, position = [], 0
    while position < total:
        runs.append(chosen[position])
        position += chosen[position][0] * chosen[position][1]
    return runs


def _counts(kinds: list[int], period: int) -> list[int]:
    """How often the `period` layers from each position on follow one another, as far as there are so many left."""
    equal = [0] * (len(kinds) + 1)
    for position in reversed(range(len(kinds) - period)):
        equal[position] = equal[position + 1] + 1 if kinds[position] == kinds[position + period] else 0
    return [1 + equal[position] // period for position in range(len(kinds) - period + 1)]
