"""How a list of layers repeats: long models are built from a few turns of each pattern.

A pattern that repeats k times is built as its first, one middle and its last turn; the middle
turn then stands for k - 2 of them. So cost does not grow with depth, nothing at a boundary is
special-cased, and alternating stacks (sliding / full attention) work like uniform ones.
Where a layer's steps reach r layers away (prefetching), r turns are built at each end.

An irregular list (a hybrid of three kinds of layers) may be built as a shorter chain in which every layer occurs among
the neighbours it has in the model; one built layer then stands for all of the same kind and neighbours.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

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
    stands_for: int | None = None
    """In a chain, the layers that this one stands for: none where another one built has the same neighbours."""

    @property
    def repeats(self) -> int:
        """How many turns of the real model this built turn stands for."""
        if self.stands_for is not None:
            return self.stands_for
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
    chain: tuple[int, ...] = ()
    """Where the layers built are a chain, the slot that stands for each real layer."""

    def slots(self) -> list[int]:
        """For every layer of the real model, the built slot that is it or stands for it."""
        if self.chain:
            return list(self.chain)
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


def shortest_layout(layers: Sequence[Hashable], reach: int = 1) -> Layout:
    """Runs of patterns; or a chain, where there is more than one run and a chain has fewer layers."""
    kinds = numbered(layers)
    runs = layout_of(kinds, reach)
    contexts = set(_contexts(kinds, reach)) if len(runs.runs) > 1 else ()
    if not 0 < len(contexts) < len(runs.places):
        return runs
    return min(runs, chain_of(kinds, reach), key=lambda layout: len(layout.places))


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


def chain_of(layers: Sequence[Hashable], reach: int = 1) -> Layout:
    """A short chain of layers in which each layer of the model occurs with the neighbours it has in the model.

    The first and the last layer of each kind are always built as such: there the life of what the layers share (a
    mask, rotary tables) begins and ends.
    """
    kinds = numbered(layers)
    contexts = _contexts(kinds, reach)
    kept = _without_loops(contexts, _links(kinds, reach))
    slot_of = {contexts[layer]: slot for slot, layer in reversed([*enumerate(kept)])}
    chain = tuple(slot_of[context] for context in contexts)
    runs = tuple(Run(layer, 1, 1, slot, reach) for slot, layer in enumerate(kept))
    places = tuple(Place(run, 0, 0, chain.count(slot)) for slot, run in enumerate(runs))
    return Layout(runs, places, chain)


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


def _contexts(kinds: list[int], reach: int) -> list[int]:
    """Layers get equal numbers where they and their neighbours are alike, and none is the first or last of a kind."""
    ends = {kinds.index(kind) for kind in kinds} | {len(kinds) - 1 - kinds[::-1].index(kind) for kind in kinds}
    padded = [-1] * reach + kinds + [-1] * reach
    around = [(i in ends and i, *padded[i : i + 2 * reach + 1]) for i in range(len(kinds))]
    return numbered(around)


def _links(kinds: list[int], reach: int) -> list[int]:
    """Equal numbers where layers up to `reach` before and after the boundary behind a position are alike."""
    padded = [-1] * reach + kinds + [-1] * reach
    return numbered([tuple(padded[i + 1 : i + 2 * reach + 1]) for i in range(len(kinds))])


def _without_loops(contexts: list[int], links: list[int]) -> list[int]:
    """Positions left when loops (from one link to the same one again) are cut out of which no context gets lost.

    The longest loop goes first; in what is left, layers have the neighbours they had.
    """
    kept = list(range(len(contexts)))
    while True:
        row = [contexts[position] for position in kept]
        first = {context: row.index(context) for context in row}
        last = {context: i for i, context in enumerate(row)}
        ahead = [links[position] for position in kept]
        loops = [(stop - start, start) for start, stop in _loops(ahead, first, last)]
        if not loops:
            return kept
        length, start = max(loops)
        del kept[start + 1 : start + 1 + length]


def _loops(links: list[int], first: dict[int, int], last: dict[int, int]) -> Iterator[tuple[int, int]]:
    """From each place the longest loop to a later place alike, between which no context has all its places."""
    for start, link in enumerate(links):
        limit = min((last[context] for context in first if first[context] > start), default=len(links))
        stop = next((i for i in range(limit - 1, start, -1) if links[i] == link), None)
        if stop is not None:
            yield start, stop


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
