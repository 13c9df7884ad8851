"""``vramsim validate``: hold the simulator against recordings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from studies.cli.output import Table, show, show_json

if TYPE_CHECKING:
    from studies.validation import Row, Validation

BOUND_NOT_MET = 3

app = typer.Typer(rich_markup_mode=None, help="Compare the simulator with recorded peaks.")


@app.callback()
def validations() -> None:
    """Compare the simulator with recorded peaks."""


@app.command("oracle")
def oracle(
    cases: Annotated[str, typer.Option(help="JSON lines, one recorded case each.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    max_mean: Annotated[float | None, typer.Option(help="Fail above this mean absolute error, in percent.")] = None,
    max_worst: Annotated[float | None, typer.Option(help="Fail above this worst absolute error, in percent.")] = None,
) -> None:
    """Simulate every case of a file and compare the peaks of the cold and the steady step."""
    from studies.validation import validate_oracle

    _validate(validate_oracle, cases, json=json, max_mean=max_mean, max_worst=max_worst)


@app.command("measured")
def measured(
    cases: Annotated[str, typer.Option(help="JSON lines, one measured run each.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    max_mean: Annotated[float | None, typer.Option(help="Fail above this mean absolute error, in percent.")] = None,
    max_worst: Annotated[float | None, typer.Option(help="Fail above this worst absolute error, in percent.")] = None,
) -> None:
    """Simulate every run of a file and compare its peak with the one measured on GPUs, in the metric it was read in."""
    from studies.validation import validate_measured

    _validate(validate_measured, cases, json=json, max_mean=max_mean, max_worst=max_worst)


def _validate(
    validate: Callable[[str], Validation], cases: str, *, json: bool, max_mean: float | None, max_worst: float | None
) -> None:
    from studies.validation import check_bound

    check_bound("max-mean", max_mean)
    check_bound("max-worst", max_worst)
    validation = validate(cases)
    if json:
        show_json(validation.to_json_dict())
    else:
        show(_tables(validation))
    exceeded = [*_exceeded(validation, "mean", max_mean), *_exceeded(validation, "worst", max_worst)]
    if exceeded:
        print(f"error: {'; '.join(exceeded)}", file=sys.stderr)
        raise typer.Exit(BOUND_NOT_MET)


def _exceeded(validation: Validation, which: str, bound: float | None) -> list[str]:
    found: float | None = getattr(validation.summary, f"{which}_abs_error_pct")
    if bound is None:
        return []
    if found is None:
        return [f"'max-{which}' {bound:g} cannot be met: no case was compared"]
    return [f"'max-{which}' must be at least the {which} error of {found:.4f} %: {bound:g}"] if found > bound else []


def _tables(validation: Validation) -> list[Table]:
    rows = [
        (row.name, _bytes(row.expected_bytes), _bytes(row.simulated_bytes), _error(row.error_pct), _remark(row))
        for row in validation.rows
    ]
    summary = validation.summary
    totals = [
        ("compared", str(summary.n)),
        ("unsupported", str(summary.unsupported)),
        ("mean absolute error", _percent(summary.mean_abs_error_pct)),
        ("worst absolute error", _percent(summary.worst_abs_error_pct)),
        ("worst error of a role", _percent(summary.worst_abs_role_error_pct)),
    ]
    header = ("case", "expected bytes", "simulated bytes", "error", "phase, or why not compared")
    return [Table("cases", rows, header, frozenset({1, 2, 3})), Table("summary", totals)]


def _bytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes:,}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f} %"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f} %"


def _remark(row: Row) -> str:
    """The phase of the peak, or both where they differ; the reason of a row that was not compared."""
    if row.reason is not None:
        return row.reason
    roles = "".join(f"; {role} {error:+.2f} %" for role, error in row.role_errors_pct.items() if abs(error) >= 0.01)
    if row.bar is not None:
        return "; ".join([f"{row.phase_simulated}, {row.metric}, {row.bar} {row.tolerance_pct:g} %", *row.notes])
    if row.phase_simulated == row.phase_expected:
        return f"{row.phase_expected or ''}{roles}"
    return f"{row.phase_simulated}, expected {row.phase_expected}{roles}"
