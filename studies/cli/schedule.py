"""``vramsim schedule``: what is in flight on each rank of a pipeline, and the order as a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from studies.cli.output import Table, show, show_json

if TYPE_CHECKING:
    from pathlib import Path

    from simulator.schedules.schedule import Schedule

Number = int | None


def command(
    name: Annotated[str, typer.Argument(help="gpipe, 1f1b, interleaved_1f1b, zb_h1, zbv, dualpipe or dualpipev.")],
    pp: Annotated[int, typer.Option(help="Ranks of the pipeline.")],
    microbatches: Annotated[int, typer.Option("--microbatches", "--micro-batches", help="Per optimizer step.")],
    chunks: Annotated[Number, typer.Option(help="Model chunks per rank (interleaved_1f1b, zb_h1).")] = None,
    group: Annotated[
        Number, typer.Option(help="Micro-batches through one chunk before the next; as many as ranks unless given.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[str | None, typer.Option(help="Draw a Gantt chart to this .png, .svg or .pdf.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --plot overwrite a file.")] = False,
) -> None:
    """Show how many micro-batches each rank of a pipeline holds at once."""
    from simulator.schedules import schedule
    from studies.schedules import schedule_data

    chosen = schedule(name, pp, microbatches, chunks, group)
    if plot is not None:
        _draw(chosen, plot, force=force)
    data = schedule_data(chosen)
    if json:
        show_json(data)
    else:
        show([_table(data)])


def _draw(schedule: Schedule, plot: str, *, force: bool) -> None:
    from studies.plots import check_target
    from studies.schedule_plot import save_schedule
    from studies.schedules import drawable

    target: Path = check_target(plot, force=force)
    save_schedule(schedule, drawable(schedule), target)


def _table(data: dict[str, Any]) -> Table:
    header = ("rank", "stages", "in flight", "by chunk", "awaiting weights", "at once")
    rows = [
        (
            str(row["rank"]),
            ", ".join(map(str, row["stages"])),
            str(row["in_flight"]),
            ", ".join(map(str, row["in_flight_by_chunk"])),
            str(row["awaiting_weights"]),
            str(row["at_once"]),
        )
        for row in data["ranks"]
    ]
    group = f", groups of {data['group']}" if data["group"] else ""
    title = (
        f"{data['schedule']} ({data['source']}): {data['microbatches']} micro-batches, {data['stages']} stages{group}; "
        "most at once, in micro-batches x chunks"
    )
    return Table(title, rows, header, frozenset({0, 2, 4, 5}))
