"""Pipeline schedules: who computes what in which order, one technique per file."""

from __future__ import annotations

from hardware.errors import unknown_name
from simulator.schedules.dualpipe import DualPipe
from simulator.schedules.dualpipev import DualPipeV
from simulator.schedules.gpipe import GPipe
from simulator.schedules.interleaved import Interleaved
from simulator.schedules.one_f_one_b import OneForwardOneBackward
from simulator.schedules.schedule import Schedule
from simulator.schedules.zbv import ZeroBubbleV
from simulator.schedules.zero_bubble_h1 import ZeroBubbleH1

SCHEDULES: dict[str, type[Schedule]] = {
    known.name: known
    for known in (GPipe, OneForwardOneBackward, Interleaved, ZeroBubbleH1, ZeroBubbleV, DualPipe, DualPipeV)
}


def schedule(name: str, pp: int, micro_batches: int, chunks: int | None = None, group: int | None = None) -> Schedule:
    """A schedule by its name, with its own defaults for what is None.

    Raises:
        UsageError: no schedule of that name, or numbers for which it is not defined.
    """
    if name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    given = {"chunks": chunks, "group": group}
    return SCHEDULES[name](pp, micro_batches, **{key: value for key, value in given.items() if value is not None})
