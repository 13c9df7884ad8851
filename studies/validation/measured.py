"""Peaks that others measured on real GPUs, held against the simulator: one row of a file, one row of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hardware.errors import UsageError
from simulator.api import simulate
from simulator.limits import is_number
from simulator.report import Report
from studies.validation.cases import read_lines
from studies.validation.compare import Row, Validation
from studies.validation.measured_run import METRICS, measured_run

BARS = ("hard", "soft", "no")
#: Above it a tolerance would excuse anything.
LARGEST_TOLERANCE = 100.0


def validate_measured(path: str | Path) -> Validation:
    """Simulate every run of a file of measured peaks, each in its own metric.

    Raises:
        UsageError: no such file, no run in it, or a line that is not a run; the line number is named.
    """
    lines = list(read_lines(path, _problem))  # all of them first: a broken line is found at once
    if not lines:
        raise UsageError(f"'cases' must hold at least one run, as a line of JSON: {path}")
    return Validation(tuple(row for line in lines for row in (_row(line), *_others(line))))


def _problem(line: Any) -> str | None:
    """What a line lacks to be a run: its name, its model, its metric and a peak with its tolerance."""
    if not isinstance(line, dict) or not isinstance(line.get("name"), str):
        return "be an object with a 'name'"
    if not isinstance(line.get("config"), dict) and not isinstance(line.get("model"), str):
        return "have a preset as 'model' or an object as 'config'"
    if line.get("metric") not in METRICS:
        return f"have as 'metric' one of {', '.join(METRICS)}"
    if not (type(line.get("expected_bytes")) is int and line["expected_bytes"] > 0):
        return "have a positive whole number of bytes as 'expected_bytes'"
    return _wrong_bar(line)


def _wrong_bar(line: Mapping[str, Any]) -> str | None:
    if line.get("bar") not in BARS:
        return f"have as 'bar' one of {', '.join(BARS)}"
    if not is_number(line.get("tolerance_pct"), 0, LARGEST_TOLERANCE):
        return f"have a percentage from 0 to {LARGEST_TOLERANCE:g} as 'tolerance_pct'"
    return None


#: Targets besides the peak, of the same run -> what they are of its report.
_OTHERS: dict[str, Callable[[Report], int]] = {
    "allocated_between_steps": lambda report: report.steady.start_bytes,
    "peak_at_first_logged_step": lambda report: report.cold.nbytes,
    "allocated_first_stage_max": lambda report: report.peak.nbytes,
    "allocated_last_stage_max": lambda report: report.peak.nbytes,
}


def _others(line: Mapping[str, Any]) -> Iterator[Row]:
    """The row's other targets, where they are simulated at all."""
    for target, read in _OTHERS.items():
        expected = (line.get("other_expected") or {}).get(target)
        if expected is not None and line["metric"] == "allocated":
            other = {**line, "name": f"{line['name']}:{target}", "expected_bytes": expected}
            yield _row({**other, **_rank_of(target, line)}, read)


def _rank_of(target: str, line: Mapping[str, Any]) -> dict[str, int]:
    """The rank that keeps the most of its stage: the first of it."""
    if target == "allocated_first_stage_max":
        return {"rank": 0}
    if target == "allocated_last_stage_max":
        return {"rank": line["num_gpus"] - line["num_gpus"] // line["mesh"]["pp"]}
    return {}


def _row(line: Mapping[str, Any], read: Callable[[Report], int] | None = None) -> Row:
    """Compare a row's peak, or what `read` takes of the report."""
    judged = {"metric": line["metric"], "tolerance_pct": float(line["tolerance_pct"]), "bar": line["bar"]}
    expected = line["expected_bytes"]
    try:
        run = measured_run(line)
        report = simulate(run.model, run.training, run.strategies, mesh=run.mesh, rank=run.rank)
    except UsageError as error:
        return Row(line["name"], expected, reason=" ".join(str(error).split()), **judged)
    except Exception as error:  # one broken row must not hide the others; it counts as not simulated
        text = " ".join(f"our error: {type(error).__name__}: {error}".split())
        return Row(line["name"], expected, reason=text, **judged)
    peak = report.steady if run.steady_only else report.peak
    found = read(report) if read else peak.nbytes
    return Row(
        name=line["name"],
        expected_bytes=expected,
        simulated_bytes=found,
        error_pct=100 * (found - expected) / expected,
        phase_simulated=None if read else peak.phase.value,
        notes=run.notes,
        **judged,
    )
