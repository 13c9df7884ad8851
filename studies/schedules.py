"""What a pipeline schedule asks of each rank, as rows of plain data."""

from __future__ import annotations

from typing import Any

from hardware.errors import UsageError
from simulator.schedules.in_flight import in_flight
from simulator.schedules.replay import Replay, replay
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import count, text

#: Of the JSON form.
SCHEMA_VERSION = 1
#: Actions that are still told apart in a drawing, and drawn within seconds.
MOST_DRAWN = 20_000


def schedule_data(schedule: Schedule) -> dict[str, Any]:
    """A schedule and its ranks; counts are micro-batches, once for each chunk they are in."""
    return {
        "schema_version": SCHEMA_VERSION,
        "schedule": schedule.name,
        "source": schedule.source,
        "pp": schedule.pp,
        "microbatches": schedule.micro_batches,
        "chunks": schedule.chunks,
        "group": schedule.group if schedule.chunks > 1 and schedule.interleaves else None,
        "stages": schedule.stages,
        "ranks": [_rank(schedule, rank) for rank in range(schedule.pp)],
    }


def _rank(schedule: Schedule, rank: int) -> dict[str, Any]:
    found, tree = in_flight(schedule, rank), schedule.tree(rank)
    return {
        "rank": rank,
        "stages": [schedule.stage(rank, chunk) for chunk in range(schedule.chunks)],
        "in_flight": found.whole,
        "in_flight_by_chunk": list(found.by_chunk),
        "awaiting_weights": found.awaiting_weights,
        "at_once": found.at_once,
        "actions": count(tree),
        "order": text(tree),
    }


def drawable(schedule: Schedule) -> Replay:
    """The replay that a chart is drawn of.

    Raises:
        UsageError: so many actions that no chart shows them.
    """
    actions = sum(count(schedule.tree(rank)) for rank in range(schedule.pp))
    if actions > MOST_DRAWN:
        fewer = max(1, schedule.micro_batches * MOST_DRAWN // actions)
        raise UsageError(
            f"'plot' draws at most {MOST_DRAWN} actions: {actions}; draw about {fewer} micro-batches, "
            "or fewer ranks or chunks: the order repeats"
        )
    return replay(schedule)


def idle_share(run: Replay) -> float:
    """The share of all ranks' time, from the first action to the last, in which they wait."""
    ranks, whole = len(run.bounds) - 1, int(run.end.max())
    return 1 - run.busy / (ranks * whole)
