"""Simulated against recorded: peaks, phases and bytes by role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs

from hardware.errors import UsageError
from simulator.api import simulate
from simulator.report import Report, StepPeak
from simulator.roles import Phase, Role
from studies.validation.cases import DISTRIBUTED, QUANTITIES, oracle_case, read_cases
from studies.validation.distributed import PHASES as DISTRIBUTED_PHASES
from studies.validation.distributed import distributed_case, role_errors

#: The oracle's words for our phases.
PHASES = {
    Phase.FORWARD: "fwd",
    Phase.BACKWARD: "bwd",
    Phase.RECOMPUTE: "recompute",
    Phase.OPTIMIZER: "opt",
    Phase.INPUT: "input",
    Phase.LOAD: "build",
}
#: The oracle's categories for our roles. What forward makes is `activation` there if it lives when forward ends and
#: `fwd_temp` otherwise; our roles say what it is for instead, so the two are compared as one.
CATEGORIES = {
    Role.PARAMETER: "param",
    Role.BUFFER: "buffer",
    Role.GRADIENT: "grad",
    Role.OPTIMIZER_STATE: "optstate",
    Role.OPTIMIZER: "opt_temp",
    Role.ACTIVATION: "forward",
    Role.LOSS_HEAD: "forward",
    Role.WEIGHT_CAST: "weight_cast",
    Role.RECOMPUTE: "recompute",
    Role.BACKWARD: "bwd_temp",
    Role.WORKSPACE: "bwd_temp",
    Role.INPUT: "input",
    Role.MASTER_WEIGHT: "param",
    Role.GATHERED: "param",
    Role.POST_FORWARD_SHARD: "param",
    Role.GATHER: "param",
    Role.REDUCE: "grad",
    Role.BUCKET: "grad",
    Role.RECEIVED: "input",
}
_FORWARD = {"activation": "forward", "fwd_temp": "forward"}


@attrs.frozen
class Row:
    """One quantity of one case: what was recorded and what was simulated."""

    name: str
    expected_bytes: int
    simulated_bytes: int | None = None
    error_pct: float | None = None
    """(simulated - expected) / expected, in percent; None where the case could not be simulated."""
    phase_expected: str | None = None
    phase_simulated: str | None = None
    reason: str | None = None
    """Why it could not be simulated."""
    role_errors_pct: dict[str, float] = attrs.field(factory=dict)
    """The same by role at the peak, for the roles that recordings of several devices tell apart."""
    metric: str = "allocated"
    """What was read off: allocated, active, reserved, process or nvidia_smi."""
    tolerance_pct: float | None = None
    """What the uncertainty of the measurement itself allows; None for recordings, which have none."""
    bar: str | None = None
    """``hard`` (an error above the tolerance is ours), ``soft`` (for averages) or ``no`` (not to be judged by)."""
    notes: tuple[str, ...] = ()
    """What the simulation takes otherwise than the run had it, and what was not said of the run."""


@attrs.frozen
class Summary:
    """`n` rows were compared, that is, have an error; the other rows are `unsupported`."""

    n: int
    unsupported: int
    mean_abs_error_pct: float | None
    worst_abs_error_pct: float | None
    worst_abs_role_error_pct: float | None = None


@attrs.frozen
class Validation:
    """The result of `validate_oracle` or `validate_measured`."""

    rows: tuple[Row, ...]

    @property
    def summary(self) -> Summary:
        """Mean and worst absolute error of the compared rows, worst by role; None where there is none."""
        errors = [abs(row.error_pct) for row in self.rows if row.error_pct is not None]
        mean = sum(errors) / len(errors) if errors else None
        roles = [abs(error) for row in self.rows for error in row.role_errors_pct.values()]
        worst, worst_role = (max(values, default=None) for values in (errors, roles))
        return Summary(len(errors), len(self.rows) - len(errors), mean, worst, worst_role)

    def to_json_dict(self) -> dict[str, Any]:
        """Rows and summary as plain data."""
        rows = [{**attrs.asdict(row), "notes": list(row.notes)} for row in self.rows]
        return {"rows": rows, "summary": attrs.asdict(self.summary)}


def validate_oracle(path: str | Path) -> Validation:
    """Simulate every case of a file in the form of the oracle's ``cases.jsonl``.

    Raises:
        UsageError: no such file, no case in it, or a line that is not a case; the line number is named.
    """
    lines = list(read_cases(path))  # all of them first: a broken line is found at once, not after the cases before it
    if not lines:
        raise UsageError(f"'cases' must hold at least one case, as a line of JSON: {path}")
    return Validation(tuple(row for line in lines for row in _rows(line)))


def check_bound(field: str, bound: float | None) -> None:
    """A bound on an error in percent; `UsageError` for one that no error can meet or miss."""
    if bound is not None and not 0 <= bound < float("inf"):
        raise UsageError(f"{field!r} must be a percentage >= 0: {bound}")


def _rows(line: Mapping[str, Any]) -> list[Row]:
    if "case" not in line:
        return _distributed_rows(line)
    names = [quantity for quantity in QUANTITIES if quantity in line]
    try:
        report = simulate(*oracle_case(line))
    except UsageError as error:
        return [_unsupported(line, name, str(error)) for name in names]
    except Exception as error:  # one broken case must not hide the others; it counts as not simulated
        text = " ".join(f"our error: {type(error).__name__}: {error}".split())
        return [_unsupported(line, name, text) for name in names]
    return [_compared(line, name, report) for name in names]


def _distributed_rows(line: Mapping[str, Any]) -> list[Row]:
    """Rows of a line in the form of the distributed oracle: one rank of many."""
    found = {quantity: line[key] for quantity, key in DISTRIBUTED.items() if key in line}
    name = line.get("name", line.get("id"))
    try:
        case = distributed_case(line)
        report = simulate(case.model, case.training, case.strategies, mesh=case.mesh, rank=case.rank)
    except UsageError as error:
        return [Row(f"{name}:{quantity}", expected, reason=str(error)) for quantity, expected in found.items()]
    except Exception as error:  # one broken case must not hide the others; it counts as not simulated
        text = " ".join(f"our error: {type(error).__name__}: {error}".split())
        return [Row(f"{name}:{quantity}", expected, reason=text) for quantity, expected in found.items()]
    return [_distributed_row(line, f"{name}:{quantity}", quantity, report) for quantity in found]


def _distributed_row(line: Mapping[str, Any], name: str, quantity: str, report: Report) -> Row:
    step, expected = step_of(report, quantity), line[DISTRIBUTED[quantity]]
    row = Row(name, expected, step.nbytes, 100 * (step.nbytes - expected) / expected)
    if quantity != "steady":  # the oracle says where the steady peak is, not the first
        return row
    where = line.get("peak_where") or {}
    return attrs.evolve(
        row,
        phase_expected=where.get("phase"),
        phase_simulated=DISTRIBUTED_PHASES[step.phase.value],
        role_errors_pct=role_errors(line, step),
    )


def _unsupported(line: Mapping[str, Any], quantity: str, reason: str) -> Row:
    recorded = line[quantity]
    name = f"{line['id']}:{quantity}"
    return Row(name, recorded["peak_r512"], phase_expected=recorded.get("phase"), reason=reason)


def _compared(line: Mapping[str, Any], quantity: str, report: Report) -> Row:
    recorded = line[quantity]
    if quantity not in ("first_iteration", "steady"):
        return _unsupported(line, quantity, f"{quantity} is not simulated by training")
    step, expected = step_of(report, quantity), recorded["peak_r512"]
    return Row(
        name=f"{line['id']}:{quantity}",
        expected_bytes=expected,
        simulated_bytes=step.nbytes,
        error_pct=100 * (step.nbytes - expected) / expected,
        phase_expected=recorded.get("phase"),
        phase_simulated=PHASES[step.phase],
    )


def step_of(report: Report, quantity: str) -> StepPeak:
    """The step that the oracle calls `quantity`."""
    return {"first_iteration": report.cold, "steady": report.steady}[quantity]


def role_difference(line: Mapping[str, Any], quantity: str, report: Report) -> float:
    """Largest difference of bytes by role at the peak, as a share of the peak.

    The oracle counts bytes before rounding, so storages smaller than 512 B leave a small difference.
    """
    expected, found = Counter[str](), Counter[str]()
    for category, nbytes in line[quantity]["categories"].items():
        expected[_FORWARD.get(category, category)] += nbytes
    for role, nbytes in step_of(report, quantity).by_role.items():
        found[CATEGORIES[role]] += nbytes
    largest = max(abs(expected[name] - found[name]) for name in expected | found)
    return largest / int(line[quantity]["peak_r512"])
