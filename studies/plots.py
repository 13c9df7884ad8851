"""The live-memory timeline of a cold and a steady step: numbers first, then a drawing of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np
import numpy.typing as npt

from hardware.errors import UsageError
from hardware.units import GIB, gib
from simulator.roles import Phase, Role
from simulator.timeline import Timeline, turns_left_out

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

    from studies.estimate import Estimate

FORMATS = (".png", ".svg", ".pdf")
#: Micro-batches drawn after the first, which they are all like but for the gradients that are there already.
LATER_MICRO_BATCHES = 2
#: Steps drawn at most; between them the highest one is kept, so that no peak is lost.
MOST_POINTS = 4000
#: A role that never holds this share of the peak is drawn but not named in the legend.
VISIBLE = 0.002

#: As wide as a digit, so that numbers line up.
FIGURE_SPACE = "\u2007"
#: Keeps text readable over lines and areas.
BEHIND_TEXT = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1}
#: Keeps a spike visible that is narrower than a dot.
OUTLINE: dict[str, Any] = {"color": "#333333", "linewidth": 0.4}
#: Names of phases where there is little room.
SHORT = {Phase.FORWARD: "fwd", Phase.BACKWARD: "bwd", Phase.OPTIMIZER: "opt"}

#: Bottom to top: what is always there first. Okabe and Ito's palette (jfly.uni-koeln.de/color) and tints of it.
COLOURS = {
    Role.BUFFER: "#999999",
    Role.PARAMETER: "#0072B2",
    Role.MASTER_WEIGHT: "#004C78",
    Role.OPTIMIZER_STATE: "#56B4E9",
    Role.BUCKET: "#01665E",
    Role.GRADIENT: "#009E73",
    Role.GATHERED: "#8C6BB1",
    Role.POST_FORWARD_SHARD: "#BCA7D6",
    Role.GATHER: "#54278F",
    Role.REDUCE: "#B2182B",
    Role.WEIGHT_CAST: "#9AD3BF",
    Role.INPUT: "#5B5B5B",
    Role.RECEIVED: "#A0A0A0",
    Role.ACTIVATION: "#E69F00",
    Role.RECOMPUTE: "#F3CF80",
    Role.LOSS_HEAD: "#D55E00",
    Role.BACKWARD: "#CC79A7",
    Role.WORKSPACE: "#7F3C5F",
    Role.OPTIMIZER: "#F0E442",
}


@attrs.frozen(eq=False)
class TimelineInfo:
    """Everything the drawing shows, in bytes.

    Attributes:
        title: model, regime and GPU.
        series: live bytes of each role that occurs, in the order they are stacked.
        total: their sum.
        ops: the number of the op at each point; where there are too many, the highest of each run is kept.
        spans: the parts of the op axis: step name, phase, first and last index.
        peak: index and bytes of the highest point.
        capacity: low and high end of the GPU's capacity.
        drawn: what of a step is drawn, where it is not all; what is left out is like what is drawn last before it.
    """

    title: str
    series: dict[Role, npt.NDArray[np.int64]]
    total: npt.NDArray[np.int64]
    ops: npt.NDArray[np.int64]
    spans: list[tuple[str, Phase, int, int]]
    peak: tuple[int, int]
    capacity: tuple[int, int]
    drawn: str


def timeline_info(result: Estimate) -> TimelineInfo:
    """The numbers of the timeline plot.

    Raises:
        UsageError: bytes that no array of 64-bit integers holds.
    """
    if result.peak.nbytes >= 2**63:
        raise UsageError(f"'plot' cannot show a peak of {gib(result.peak.nbytes)}: choose a smaller workload")
    timeline = result.report.timeline(LATER_MICRO_BATCHES)
    first = timeline.marks["cold"]
    kept = first + _kept(timeline.total[first:])
    nbytes = timeline.nbytes[kept]
    series = {role: nbytes[:, timeline.roles.index(role)] for role in COLOURS}
    total = timeline.total[kept]
    steps = np.array([timeline.marks["steady"] <= index for index in kept])
    peak = int(np.argmax(np.where(steps == (result.peak.step == "steady"), total, 0)))
    return TimelineInfo(
        title=f"{result.report.model.name} on {result.cluster}\n{result.workload}",
        series={role: values for role, values in series.items() if values.any()},
        total=total,
        ops=kept - first,
        spans=_spans(timeline, kept),
        peak=(peak, int(total[peak])),
        capacity=(result.cluster.gpu.capacity.low, result.cluster.gpu.capacity.high),
        drawn=_drawn(result),
    )


def _drawn(result: Estimate) -> str:
    report = result.report
    left_out = turns_left_out(report.program.steady, LATER_MICRO_BATCHES)
    if not left_out:
        return ""
    if report.plan.pipeline is not None:
        return f"without {left_out} turns that run alike"
    accumulation = report.training.gradient_accumulation
    return f"{accumulation - left_out} of {accumulation} micro-batches"


def _kept(total: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Indices to draw: of every run of steps, its highest."""
    if len(total) <= MOST_POINTS:
        return np.arange(len(total))
    edges = np.linspace(0, len(total), MOST_POINTS + 1).astype(np.int64)
    return np.array([a + int(np.argmax(total[a:b])) for a, b in pairwise(edges.tolist())])


def _spans(timeline: Timeline, kept: npt.NDArray[np.int64]) -> list[tuple[str, Phase, int, int]]:
    """Runs of the same step and phase; recomputation is part of backward, and inputs of forward."""
    drawn = {Phase.RECOMPUTE: Phase.BACKWARD, Phase.INPUT: Phase.FORWARD}
    steady = timeline.marks["steady"]
    spans: list[tuple[str, Phase, int, int]] = []
    for index, step in enumerate(kept.tolist()):
        phase = drawn.get(timeline.phases[step], timeline.phases[step])
        name = "steady" if step >= steady else "cold"
        if spans and spans[-1][:2] == (name, phase):
            spans[-1] = (name, phase, spans[-1][2], index)
        else:
            spans.append((name, phase, index, index))
    return spans


def plot_timeline(info: TimelineInfo, ax: Axes) -> Axes:
    """Draw `info` on `ax`: stacked areas by role, phases, the peak and the capacity; returns `ax`."""
    stack = [values / GIB for values in info.series.values()]
    colours = [COLOURS[role] for role in info.series]
    areas = ax.stackplot(info.ops, *stack, colors=colours, step="post", linewidth=0)
    ax.step(info.ops, info.total / GIB, where="post", **OUTLINE)
    _limits(info, ax)
    _draw_phases(info, ax)
    _draw_capacity(info, ax)
    _draw_peak(info, ax)
    _draw_legend(info, ax, areas)
    ax.set_xlabel("ops in execution order" + (f" ({info.drawn})" if info.drawn else ""))
    ax.set_ylabel("allocated memory (GiB)")
    ax.set_title(info.title, loc="left", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _draw_legend(info: TimelineInfo, ax: Axes, areas: Sequence[Artist]) -> None:
    """Roles in the order of the stack, with what each holds at the peak: its spike may be thinner than a line."""
    shown = []
    width = max(len(_at_peak(info, role)) for role in info.series)
    for area, (role, values) in zip(areas, info.series.items(), strict=True):
        if values.max() >= VISIBLE * info.peak[1]:
            shown.append((area, f"{_at_peak(info, role).rjust(width, FIGURE_SPACE)}  {role.value}"))
    legend = ax.legend(
        *zip(*shown[::-1], strict=True),
        title="GiB at the peak", loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, alignment="left",
    )  # fmt: skip
    legend.get_title().set_fontweight("bold")


def _at_peak(info: TimelineInfo, role: Role) -> str:
    return f"{info.series[role][info.peak[0]] / GIB:.2f}"


def _limits(info: TimelineInfo, ax: Axes) -> None:
    """Show the capacity unless that would flatten the areas."""
    top = info.peak[1]
    if info.capacity[0] < 1.6 * top:
        top = max(top, info.capacity[1])
    ax.set_xlim(0, max(int(info.ops[-1]), 1))
    ax.set_ylim(0, top / GIB * 1.16)


def _draw_capacity(info: TimelineInfo, ax: Axes) -> None:
    low, high = info.capacity
    inside = low / GIB <= ax.get_ylim()[1]
    text = f"capacity {gib(low)}" if low == high else f"capacity {gib(low)} to {gib(high)}"
    if inside:
        ax.axhspan(low / GIB, high / GIB, color="black", alpha=0.2, linewidth=0)
        ax.axhline(low / GIB, color="black", linewidth=1, linestyle="--")
        left = info.ops[info.peak[0]] > 0.4 * info.ops[-1]  # on the side where the peak's own label is not
        ax.annotate(
            text, (0.005 if left else 0.995, high / GIB), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left" if left else "right", va="bottom", fontsize=8,
            bbox=BEHIND_TEXT,
        )  # fmt: skip
    else:
        ax.annotate(
            f"{text} (above)", (0.995, 0.985), xycoords="axes fraction", ha="right", va="top", fontsize=8,
            bbox=BEHIND_TEXT,
        )  # fmt: skip


def _draw_phases(info: TimelineInfo, ax: Axes) -> None:
    """A line where a phase begins, behind the areas; its name, short where there is little room; the step's above."""
    width = int(info.ops[-1])
    for index, (name, phase, start, end) in enumerate(info.spans):
        first, last = int(info.ops[start]), int(info.ops[end])
        starts_step = index == 0 or info.spans[index - 1][0] != name
        line = {"linewidth": 1.2, "alpha": 0.8} if starts_step else {"linewidth": 0.5, "alpha": 0.35}
        ax.axvline(first, color="black", zorder=2 if starts_step else 0, **line)
        if starts_step:
            ax.annotate(
                f"{name} step", (first, 1.0), (4, -4), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="top", fontsize=9, fontweight="bold", bbox=BEHIND_TEXT,
            )  # fmt: skip
        if last - first > 0.022 * width:
            text = phase.value if last - first > 0.08 * width else SHORT.get(phase, "")
            ax.annotate(
                text, ((first + last) / 2, 0.945), xycoords=("data", "axes fraction"),
                ha="center", va="top", fontsize=8, color="#333333",
            )  # fmt: skip


def _draw_peak(info: TimelineInfo, ax: Axes) -> None:
    op, nbytes = int(info.ops[info.peak[0]]), info.peak[1]
    right = op > 0.8 * info.ops[-1]
    ax.plot([op], [nbytes / GIB], marker="o", markersize=4, color="black")
    ax.annotate(
        f"peak {gib(nbytes)}", (op, nbytes / GIB), (-6 if right else 6, 6), textcoords="offset points",
        ha="right" if right else "left", va="bottom", fontsize=9, fontweight="bold", bbox=BEHIND_TEXT,
    )  # fmt: skip


def check_target(path: str, *, force: bool) -> Path:
    """The file to draw to, checked before anything is simulated.

    Raises:
        UsageError: a format that is not drawn, a folder that is not there, or a file that would be overwritten.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS:
        raise UsageError(f"'plot' must end in {', '.join(FORMATS)}: {path!r}")
    try:
        if target.is_dir() or not target.parent.is_dir():
            raise UsageError(f"'plot' must be a file in a folder that exists: {path!r}")
        if target.exists() and not force:
            raise UsageError(f"'plot' would overwrite {path!r}: choose another name or add --force")
        _try_to_write(target)
    except OSError as error:
        raise UsageError(f"'plot' cannot be written: {error.strerror}; choose another path than {path!r}") from None
    return target


def _try_to_write(target: Path) -> None:
    """Open the file for writing and leave all as it was; only this tells of rights and read-only file systems."""
    existed = target.exists()
    with target.open("ab"):
        pass
    if not existed:
        target.unlink()


def save_timeline(result: Estimate, target: Path) -> None:
    """Draw the timeline of an estimate to a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    plot_timeline(timeline_info(result), figure.add_subplot())
    try:
        figure.savefig(target, dpi=150)
    except OSError as error:
        raise UsageError(f"'plot' cannot be written: {target} ({error.strerror})") from None
