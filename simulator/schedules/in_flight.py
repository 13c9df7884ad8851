"""How many micro-batches a rank holds at once, folded from its tree."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Gains, Kind, Node, fold, fold_by_chunk


@attrs.frozen
class InFlight:
    """The most that a rank holds at once; a micro-batch counts once for each chunk it is in.

    Attributes:
        whole: forward is done, backward is not: all activations are held.
        awaiting_weights: backward for the inputs is done, that for the weights is not.
        at_once: either of both.
        by_chunk: `whole` of each chunk by itself.
    """

    whole: int
    awaiting_weights: int
    at_once: int
    by_chunk: tuple[int, ...]


def in_flight(schedule: Schedule, rank: int) -> InFlight:
    """What a rank of a schedule holds, without unrolling it."""
    tree = schedule.tree(rank)
    every, none = [1] * schedule.chunks, [0] * schedule.chunks
    by_chunk = fold_by_chunk(tree, _gains(every, none))
    return InFlight(
        whole=most_held(tree, every, none),
        awaiting_weights=most_held(tree, none, every),
        at_once=most_held(tree, every, every),
        by_chunk=tuple(by_chunk[chunk][1] for chunk in range(schedule.chunks)),
    )


def most_held(tree: Node, whole: Sequence[int], awaiting: Sequence[int]) -> int:
    """The most that is held at once, in the unit of the arguments.

    Args:
        tree: a rank's actions.
        whole: of each chunk, what a micro-batch holds between its forward and its backward.
        awaiting: of each chunk, what is left of that between its backward for inputs and that for weights.
    """
    return fold(tree, _gains(whole, awaiting))[1]


def _gains(whole: Sequence[int], awaiting: Sequence[int]) -> Gains:
    gains: dict[Kind, Sequence[int]] = {
        Kind.F: whole,
        Kind.B: [-held for held in whole],
        Kind.I: [left - held for held, left in zip(whole, awaiting, strict=True)],
        Kind.W: [-left for left in awaiting],
    }
    return [gains[kind] for kind in Kind]
