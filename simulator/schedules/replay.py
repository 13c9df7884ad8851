"""Runs the orders of all ranks, each waiting for what it needs: the check of an order, and its times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np
import numpy.typing as npt

from hardware.errors import UsageError
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Kind, Order, flat

Ints = npt.NDArray[np.int64]
KINDS = len(Kind)
#: Equal times for F, I and W, as the papers draw them (arXiv:2401.10241, figure 3).
EQUAL_TIMES: Mapping[Kind, int] = {Kind.F: 1, Kind.B: 2, Kind.I: 1, Kind.W: 1}


@attrs.frozen(eq=False)
class Replay:
    """Orders of all ranks, one after the other, with the time at which each action starts and ends.

    Attributes:
        order: of shape (actions, 4), see `tree.Order`.
        stage: of each action.
        bounds: rank r has the actions ``bounds[r]`` to ``bounds[r + 1]``.
        start: when an action starts; two that overlap start and end together and take the time of both.
        end: when it is done.
        busy: time that all ranks together compute.
    """

    order: Order
    stage: Ints
    bounds: Ints
    start: Ints
    end: Ints
    busy: int


def orders(schedule: Schedule) -> list[Order]:
    """The order of each rank."""
    return [flat(schedule.tree(rank)) for rank in range(schedule.pp)]


def replay(
    schedule: Schedule, rank_orders: Sequence[Order] | None = None, times: Mapping[Kind, int] = EQUAL_TIMES
) -> Replay:
    """Check and time the orders of all ranks; every rank runs its own strictly one after the other.

    Args:
        schedule: whose stages, micro-batches and chunks the orders are for.
        rank_orders: one for each rank; None for the schedule's own.
        times: how long each kind of action takes; sending takes none.

    Raises:
        UsageError: an action that is missing, done twice, on an unknown chunk or on a rank that did not run its
            forward, or ranks that wait for each other.
    """
    found = orders(schedule) if rank_orders is None else list(rank_orders)
    if len(found) != schedule.pp:
        raise UsageError(f"{schedule.name} has {schedule.pp} ranks and needs an order for each: {len(found)}")
    bounds = np.cumsum([0, *map(len, found)])
    order = np.concatenate(found)
    _check_range(schedule, order)
    _check_pairs(schedule, order, bounds)
    stages = np.array([[schedule.stage(r, c) for c in range(schedule.chunks)] for r in range(schedule.pp)])
    rank = np.repeat(np.arange(schedule.pp), np.diff(bounds))
    stage = stages[rank, order[:, 1]]
    _check_once(schedule, order, stage)
    _check_holder(schedule, order, stage, rank)
    start, end = _run(schedule, order, stage, bounds, times)
    busy = int(np.array([times[kind] for kind in Kind])[order[:, 0]].sum())
    return Replay(order, stage, bounds, start, end, busy)


def _check_range(schedule: Schedule, order: Order) -> None:
    sizes = (KINDS, schedule.chunks, schedule.micro_batches, 2)
    for name, column, size in zip(("kind", "chunk", "micro-batch", "overlapped"), order.T, sizes, strict=True):
        if column.size and (column.min() < 0 or column.max() >= size):
            wrong = column.min() if column.min() < 0 else column.max()
            raise UsageError(f"an order of {schedule.name} has {name} {wrong}: it must be from 0 to {size - 1}")


def _check_pairs(schedule: Schedule, order: Order, bounds: Ints) -> None:
    """What starts together with the next action has a next one on its rank, which does not do so too."""
    pairs = order[:, 3] > 0
    followed = np.append(pairs[1:], True)
    last = bounds[1:] - 1
    followed[last[np.diff(bounds) > 0]] = True
    if (pairs & followed).any():
        raise UsageError(f"an order of {schedule.name} overlaps an action with no next one, or with a pair")


def _check_once(schedule: Schedule, order: Order, stage: Ints) -> None:
    """Every micro-batch goes once through every stage, forward and backward, the latter whole or in two halves."""
    where = stage * schedule.micro_batches + order[:, 2]
    places = schedule.stages * schedule.micro_batches
    done = np.bincount(where * KINDS + order[:, 0], minlength=places * KINDS).reshape(places, KINDS)
    forward, whole, inputs, weights = done.T
    wrong = (forward != 1) | (whole + inputs != 1) | (inputs != weights)
    if wrong.any():
        stage_found, micro_batch = divmod(int(wrong.argmax()), schedule.micro_batches)
        counts = ", ".join(f"{kind.name} {done[wrong.argmax(), kind]}" for kind in Kind)
        raise UsageError(
            f"micro-batch {micro_batch} on stage {stage_found} needs one F, and one B or else one I and one W: {counts}"
        )


def _check_holder(schedule: Schedule, order: Order, stage: Ints, rank: Ints) -> None:
    """Backward runs where forward did: a stage may be held by two ranks."""
    where = stage * schedule.micro_batches + order[:, 2]
    forward = order[:, 0] == Kind.F
    holder = np.full(schedule.stages * schedule.micro_batches, -1)
    holder[where[forward]] = rank[forward]
    elsewhere = holder[where] != rank
    if elsewhere.any():
        what = _described(order, stage, int(elsewhere.argmax()))
        raise UsageError(f"an order of {schedule.name} has {what} on another rank than its forward")


def _needs(schedule: Schedule, order: Order, stage: Ints) -> Ints:
    """The index of the action that each action waits for; one past the last for those that wait for none."""
    kind, micro_batch = order[:, 0], order[:, 2]
    here = stage * schedule.micro_batches + micro_batch
    index = np.arange(len(order))
    forward, backward = (np.full(schedule.stages * schedule.micro_batches, len(order)) for _ in range(2))
    is_forward, is_weights = kind == Kind.F, kind == Kind.W
    is_backward = ~is_forward & ~is_weights
    forward[here[is_forward]] = index[is_forward]
    backward[here[is_backward]] = index[is_backward]
    needs = np.full(len(order), len(order))
    later = is_forward & (stage > 0)
    needs[later] = forward[here[later] - schedule.micro_batches]
    inner = is_backward & (stage < schedule.stages - 1)
    needs[inner] = backward[here[inner] + schedule.micro_batches]
    # The last stage's backward follows its own forward; elsewhere that follows from the chain over the stages.
    turning = is_backward & (stage == schedule.stages - 1)
    needs[turning] = forward[here[turning]]
    needs[is_weights] = backward[here[is_weights]]
    return needs


def _run(schedule: Schedule, order: Order, stage: Ints, bounds: Ints, times: Mapping[Kind, int]) -> tuple[Ints, Ints]:
    """Start and end of every action; each rank goes on until it must wait, again and again."""
    needs = _needs(schedule, order, stage)
    takes = np.array([times[kind] for kind in Kind])[order[:, 0]]
    # Of two that start together, the first takes the time of both, after a gate that waits for what the second needs.
    pairs = np.flatnonzero(order[:, 3])
    takes[pairs] += takes[pairs + 1]
    takes[pairs + 1] = 0
    moved = np.arange(len(order) + 1) + np.searchsorted(pairs, np.arange(len(order) + 1), side="right")
    gates = np.insert(moved[needs], pairs, moved[needs[pairs + 1]])
    first = bounds + np.searchsorted(pairs, bounds)
    ends, stuck = _advance(gates.tolist(), np.insert(takes, pairs, 0).tolist(), first.tolist())
    if stuck is not None:
        action = int(np.searchsorted(moved, stuck))
        raise UsageError(_waiting(schedule, order, stage, bounds, action, int(np.searchsorted(moved, gates[stuck]))))
    end = np.array(ends, dtype=np.int64)[moved[:-1]]
    start = end - takes
    start[pairs + 1] = start[pairs]
    return start, end


def _waiting(schedule: Schedule, order: Order, stage: Ints, bounds: Ints, action: int, needed: int) -> str:
    what, awaited = _described(order, stage, action), _described(order, stage, needed)
    rank = int(np.searchsorted(bounds, action, side="right")) - 1
    return f"ranks of {schedule.name} wait for each other: rank {rank}, before {what}, for {awaited}"


def _described(order: Order, stage: Ints, action: int) -> str:
    return f"{Kind(order[action, 0]).name} of micro-batch {order[action, 2]} on stage {stage[action]}"


def _advance(needs: list[int], takes: list[int], bounds: list[int]) -> tuple[list[int], int | None]:
    """When every action ends, and the action at which a rank is stuck for good, or None.

    Plain lists: reading one element of an array costs several times as much, and every action reads some.
    """
    ends = [-1] * len(needs) + [0]
    cursors, clocks = bounds[:-1], [0] * (len(bounds) - 1)
    waiting = [rank for rank, cursor in enumerate(cursors) if cursor < bounds[rank + 1]]
    while waiting:
        before = cursors.copy()
        for rank in waiting:
            clock = clocks[rank]
            action = cursors[rank]
            last = bounds[rank + 1]
            while action < last and (ready := ends[needs[action]]) >= 0:
                if ready > clock:  # max() would take as long as all the rest
                    clock = ready
                clock += takes[action]
                ends[action] = clock
                action += 1
            cursors[rank], clocks[rank] = action, clock
        if cursors == before:
            return ends, cursors[waiting[0]]
        waiting = [rank for rank in waiting if cursors[rank] < bounds[rank + 1]]
    return ends, None
