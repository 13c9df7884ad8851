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
        start: when an action starts.
        end: when it is done.
    """

    order: Order
    stage: Ints
    bounds: Ints
    start: Ints
    end: Ints


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
        UsageError: an action that is missing, done twice or on an unknown chunk, or ranks that wait for each other.
    """
    found = orders(schedule) if rank_orders is None else list(rank_orders)
    bounds = np.cumsum([0, *map(len, found)])
    order = np.concatenate(found)
    _check_range(schedule, order)
    _check_pairs(schedule, order, bounds)
    places = np.array([[schedule.stage(r, c) for c in range(schedule.chunks)] for r in range(schedule.pp)])
    stage = places[np.repeat(np.arange(schedule.pp), np.diff(bounds)), order[:, 1]]
    _check_once(schedule, order, stage)
    start, end = _run(schedule, order, stage, bounds, times)
    return Replay(order, stage, bounds, start, end)


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
            f"micro-batch {micro_batch} on stage {stage_found} needs one F and either one B or one I and one W: {counts}"
        )


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
    overlapped = np.flatnonzero(order[:, 3])
    takes = np.array([times[kind] for kind in Kind])[order[:, 0]]
    # Of two that start together, the first waits for what both need and takes the time of both.
    others = np.full(len(order), len(order))
    others[overlapped] = needs[overlapped + 1]
    takes[overlapped] += takes[overlapped + 1]
    takes[overlapped + 1] = 0
    clocks = _Clocks(needs.tolist(), others.tolist(), takes.tolist(), [0] * len(order), [-1] * len(order) + [0])
    begun = bounds[:-1].tolist()
    stuck = clocks.finish(begun, bounds[1:].tolist())
    if stuck is not None:
        what, needed = (_described(order, stage, int(i)) for i in (stuck, clocks.awaited(stuck)))
        rank = int(np.searchsorted(bounds, stuck, side="right")) - 1
        raise UsageError(f"the ranks of {schedule.name} wait for each other: rank {rank} for {needed} before {what}")
    start = np.array(clocks.start, dtype=np.int64)
    start[overlapped + 1] = start[overlapped]
    return start, np.array(clocks.end[:-1], dtype=np.int64)


def _described(order: Order, stage: Ints, action: int) -> str:
    return f"{Kind(order[action, 0]).name} of micro-batch {order[action, 2]} on stage {stage[action]}"


@attrs.define
class _Clocks:
    """What each action waits for (two actions), how long it takes, when it started and ended (-1: not yet).

    Plain lists: reading one element of an array costs several times as much, and every action reads some.
    """

    needs: list[int]
    others: list[int]
    takes: list[int]
    start: list[int]
    end: list[int]

    def finish(self, cursors: list[int], ends: list[int]) -> int | None:
        """Run every rank from its cursor to its end; the action at which a rank is stuck for good, or None."""
        clocks = [0] * len(cursors)
        moved = True
        while moved:
            moved = False
            for rank, cursor in enumerate(cursors):
                if cursor < ends[rank]:
                    cursors[rank], clocks[rank] = self._advance(cursor, ends[rank], clocks[rank])
                    moved = moved or cursors[rank] > cursor
        return next((cursor for cursor, end in zip(cursors, ends, strict=True) if cursor < end), None)

    def awaited(self, action: int) -> int:
        """What an action still waits for."""
        needed = self.needs[action]
        return needed if self.end[needed] < 0 else self.others[action]

    def _advance(self, action: int, last: int, clock: int) -> tuple[int, int]:
        needs, others, takes, start, end = self.needs, self.others, self.takes, self.start, self.end
        while action < last:
            ready, ready_too = end[needs[action]], end[others[action]]
            if ready < 0 or ready_too < 0:
                break
            clock = max(clock, ready, ready_too)
            start[action] = clock
            clock += takes[action]
            end[action] = clock
            action += 1
        return action, clock
