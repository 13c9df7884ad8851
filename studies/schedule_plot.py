"""The Gantt chart of a pipeline schedule: a row per rank, a box per action."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hardware.errors import UsageError
from simulator.schedules.in_flight import in_flight
from simulator.schedules.replay import Replay
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Kind
from studies.schedules import idle_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's palette (jfly.uni-koeln.de/color).
COLOURS = {Kind.F: "#0072B2", Kind.B: "#009E73", Kind.I: "#E69F00", Kind.W: "#CC79A7"}
NAMES = {Kind.F: "forward", Kind.B: "backward", Kind.I: "backward, inputs", Kind.W: "backward, weights"}
#: A row's height; the rest is the gap to the next.
HEIGHT = 0.86
#: Inches of a unit of time at which a number still fits into its box.
READABLE = 0.11
WIDEST, TALLEST = 22.0, 24.0
EDGE = "#222222"


def plot_schedule(schedule: Schedule, run: Replay, ax: Axes) -> Axes:
    """Draw a replay; lighter boxes are later chunks, framed pairs overlap.

    In brackets, the micro-batches x chunks that a rank holds at once.
    """
    rank = np.repeat(np.arange(schedule.pp), np.diff(run.bounds))
    boxes = _boxes(run, rank)
    for kind in Kind:
        for chunk in range(schedule.chunks):
            chosen = (run.order[:, 0] == kind) & (run.order[:, 1] == chunk)
            if chosen.any():
                _draw(ax, boxes[chosen], kind, chunk, schedule.chunks)
    _frame(ax, run, rank)
    if ax.get_figure() is not None and _inches_per_unit(ax, run) >= READABLE:
        _number(ax, run, boxes)
    _label(ax, schedule, run)
    return ax


def _boxes(run: Replay, rank: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Left, bottom, width and height of every action; of an overlapped pair, the halves of one row."""
    first = run.order[:, 3] > 0
    second = np.append(False, first[:-1])
    height = np.where(first | second, HEIGHT / 2, HEIGHT)
    bottom = rank - HEIGHT / 2 + np.where(second, HEIGHT / 2, 0)
    return np.stack([run.start, bottom, run.end - run.start, height], axis=1)


def _draw(ax: Axes, boxes: npt.NDArray[np.float64], kind: Kind, chunk: int, chunks: int) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.colors import to_rgb

    left, bottom, width, height = boxes.T
    x = np.stack([left, left + width, left + width, left], axis=1)
    y = np.stack([bottom, bottom, bottom + height, bottom + height], axis=1)
    white = 0.6 * chunk / max(1, chunks - 1)
    colour = tuple(part + (1 - part) * white for part in to_rgb(COLOURS[kind]))
    name = NAMES[kind] if chunks == 1 else f"{NAMES[kind]}, chunk {chunk}"
    ax.add_collection(
        PolyCollection(
            list(np.stack([x, y], axis=2)), facecolors=[colour], edgecolors="white", linewidths=0.5, label=name
        )
    )


def _frame(ax: Axes, run: Replay, rank: npt.NDArray[np.int64]) -> None:
    from matplotlib.collections import PolyCollection

    first = np.flatnonzero(run.order[:, 3])
    left, right, low = run.start[first], run.end[first], rank[first] - HEIGHT / 2
    x = np.stack([left, right, right, left], axis=1)
    y = np.stack([low, low, low + HEIGHT, low + HEIGHT], axis=1)
    ax.add_collection(
        PolyCollection(list(np.stack([x, y], axis=2)), facecolors="none", edgecolors=EDGE, linewidths=0.9)
    )


def _inches_per_unit(ax: Axes, run: Replay) -> float:
    figure: Any = ax.get_figure()
    return float(figure.get_size_inches()[0] * ax.get_position().width / run.end.max())


def _number(ax: Axes, run: Replay, boxes: npt.NDArray[np.float64]) -> None:
    centres = boxes[:, :2] + boxes[:, 2:] / 2
    light = (run.order[:, 1] > 0) | (run.order[:, 0] >= Kind.I)
    for (x, y), number, height, dark in zip(centres, run.order[:, 2], boxes[:, 3], light, strict=True):
        ax.text(
            x, y, str(number), ha="center", va="center", fontsize=6 if height < HEIGHT else 7,
            color="black" if dark else "white",
        )  # fmt: skip


def _label(ax: Axes, schedule: Schedule, run: Replay) -> None:
    counts = [in_flight(schedule, rank).at_once for rank in range(schedule.pp)]
    ax.set_xlim(0, run.end.max())
    ax.set_ylim(schedule.pp - 0.5, -0.5)
    step = max(1, schedule.pp // 32)
    ax.set_yticks(range(0, schedule.pp, step), [f"rank {r} ({counts[r]})" for r in range(0, schedule.pp, step)])
    chunks = f", {schedule.chunks} chunks per rank" if schedule.chunks > 1 else ""
    ax.set_title(
        f"{schedule.name}: {schedule.pp} ranks, {schedule.micro_batches} micro-batches{chunks}; "
        f"idle {idle_share(run):.1%} of the time",
        loc="left", fontsize=10,
    )  # fmt: skip
    ax.set_xlabel("time, where a forward and each half of a backward take 1")
    ax.set_ylabel("(most at once)")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)


def save_schedule(schedule: Schedule, run: Replay, target: Path) -> None:
    """Draw a chart to a file, large enough for its numbers where that is possible.

    Raises:
        UsageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    width = min(WIDEST, max(8.0, float(run.end.max()) * READABLE * 1.6 + 1.5))
    height = min(TALLEST, 1.9 + 0.32 * schedule.pp)
    figure = Figure(figsize=(width, height), layout="constrained")
    plot_schedule(schedule, run, figure.add_subplot())
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise UsageError(f"'plot' cannot be written: {target} ({error.strerror})") from None
