"""Comparing the simulator with recorded peaks of real PyTorch code (the oracle's case files)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from hardware.dtypes import TRAINING_DTYPES, dtype
from hardware.errors import UnsupportedError, UsageError
from simulator.api import simulate
from simulator.model import ModelSpec
from simulator.plan import Strategy
from simulator.reading import spec_from_class
from simulator.report import Report, StepPeak
from simulator.roles import Phase, Role
from simulator.workload import Optimizer, Training
from strategies.checkpointing import FullCheckpointing

#: The oracle's words for our phases.
PHASES = {
    Phase.FORWARD: "fwd",
    Phase.BACKWARD: "bwd",
    Phase.RECOMPUTE: "recompute",
    Phase.OPTIMIZER: "opt",
    Phase.INPUT: "input",
    Phase.LOAD: "build",
}
#: The oracle's categories for our roles; what forward makes is its `activation` or `fwd_temp`.
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
}
_FORWARD_CATEGORIES = ("activation", "fwd_temp")
_QUANTITIES = ("first_iteration", "steady", "prefill", "decode", "generate")
#: Quantities of a case on several devices -> its keys.
_DISTRIBUTED = {"first_iteration": "first_step_peak_bytes", "steady": "peak_bytes"}
_IMPLEMENTATIONS = {"foreach": "foreach", "fused": "fused", "forloop": "for-loop"}
_DROPOUT_RATES = {
    "GPT2Config": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "LlamaConfig": ("attention_dropout",),
    "Gemma2Config": ("attention_dropout",),
}
#: Keys of a case that say how it was run or recorded, or that matter in modes refused below; none changes training.
_HARMLESS = {"mode", "lora", "device", "fake", "timeline", "layers", "emulate", "logits_to_keep_prefill"}
_HARMLESS |= {"new_tokens", "model", "config_override", "config_class", "config", "tags", "id", "experts"}
_USED = {"dtype", "autocast", "attn", "sdpa_backend", "batch", "seq", "grad_accum", "optimizer", "checkpointing"}
_USED |= {"attention_mask", "keep_outputs", "clip", "dropout_off", "zero_grad"}


@attrs.frozen
class Row:
    """One quantity of one case: what was recorded and what was simulated."""

    name: str
    expected_bytes: int | None
    simulated_bytes: int | None = None
    error_pct: float | None = None
    """(simulated - expected) / expected, in percent; None where the case could not be simulated."""
    phase_expected: str | None = None
    phase_simulated: str | None = None
    reason: str | None = None
    """Why it could not be simulated."""


@attrs.frozen
class Summary:
    """Over the rows that were compared (`n`); the others are `unsupported`."""

    n: int
    unsupported: int
    mean_abs_error_pct: float | None
    worst_abs_error_pct: float | None


@attrs.frozen
class Validation:
    """The result of `validate_oracle`."""

    rows: tuple[Row, ...]

    @property
    def summary(self) -> Summary:
        """Mean and worst absolute error of the compared rows."""
        errors = [abs(row.error_pct) for row in self.rows if row.error_pct is not None]
        mean = sum(errors) / len(errors) if errors else None
        return Summary(len(errors), len(self.rows) - len(errors), mean, max(errors, default=None))

    def to_json_dict(self) -> dict[str, Any]:
        """Rows and summary as plain data."""
        return {"rows": [attrs.asdict(row) for row in self.rows], "summary": attrs.asdict(self.summary)}


def validate_oracle(path: str | Path) -> Validation:
    """Simulate every case of a file in the form of the oracle's ``cases.jsonl``.

    Raises:
        UsageError: no such file, no case in it, or a line that is not a case; the line number is named.
    """
    rows = tuple(row for line in list(read_cases(path)) for row in _rows(line))
    if not rows:
        raise UsageError(f"'cases' must hold at least one case, as a line of JSON: {path}")
    return Validation(rows)


def check_bound(field: str, bound: float | None) -> None:
    """A bound on an error in percent; `UsageError` for one that no error can meet or miss."""
    if bound is not None and not 0 <= bound < float("inf"):
        raise UsageError(f"{field!r} must be a percentage >= 0: {bound}")


def read_cases(path: str | Path) -> Iterator[dict[str, Any]]:
    """The cases of a JSON-lines file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'cases' must be a readable file: {path} ({error.__class__.__name__})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield _parse(line, number, path)


def _parse(line: str, number: int, path: str | Path) -> dict[str, Any]:
    try:
        case = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"line {number} of {path} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"line {number} of {path} holds a number too long or lists too deep") from None
    problem = _problem(case)
    if problem:
        raise UsageError(f"line {number} of {path} must {problem}")
    return dict(case)


def _problem(line: Any) -> str | None:
    """What a line lacks to be a case: its name, its workload, and a peak to compare with."""
    if not isinstance(line, dict) or not isinstance(line.get("id", line.get("name")), str):
        return "be an object with an 'id' (or 'name')"
    if "case" not in line:
        keys = [key for key in _DISTRIBUTED.values() if key in line]
        peaks = [line[key] for key in keys]
    else:
        if not (isinstance(line["case"], dict) and isinstance(line.get("config"), dict)):
            return "have objects as 'case' and 'config'"
        if not isinstance(line.get("config_class"), str):
            return "have a name as 'config_class', such as 'LlamaConfig'"
        keys = [key for key in _QUANTITIES if key in line]
        peaks = [line[key].get("peak_r512") if isinstance(line[key], dict) else None for key in keys]
    if not keys:
        return f"have a recorded peak: {', '.join(_QUANTITIES)}, or of several devices {_DISTRIBUTED['steady']}"
    wrong = [key for key, peak in zip(keys, peaks, strict=True) if not (type(peak) is int and peak > 0)]
    return f"have a positive whole number of bytes as the peak of {wrong[0]!r}" if wrong else None


def _rows(line: dict[str, Any]) -> list[Row]:
    if "case" not in line:
        return _distributed_rows(line)
    names = [quantity for quantity in _QUANTITIES if quantity in line]
    try:
        report = simulate(*oracle_case(line))
    except UsageError as error:
        return [_unsupported(line, name, str(error)) for name in names]
    except Exception as error:  # one broken case must not hide the others; it counts as not simulated
        return [_unsupported(line, name, f"our error: {type(error).__name__}: {error}") for name in names]
    return [_compared(line, name, report) for name in names]


def _distributed_rows(line: dict[str, Any]) -> list[Row]:
    """Rows of a line in the form of the distributed oracle, which no strategy simulates yet."""
    name, reason = line.get("name", line.get("id")), "several devices are not simulated yet"
    return [Row(f"{name}:{q}", line.get(key), reason=reason) for q, key in _DISTRIBUTED.items() if key in line]


def _unsupported(line: dict[str, Any], quantity: str, reason: str) -> Row:
    expected = line[quantity]
    return Row(
        f"{line['id']}:{quantity}", expected.get("peak_r512"), phase_expected=expected.get("phase"), reason=reason
    )


def _compared(line: dict[str, Any], quantity: str, report: Report) -> Row:
    expected, step = line[quantity], step_of(report, quantity)
    error = 100 * (step.nbytes - expected["peak_r512"]) / expected["peak_r512"]
    return Row(
        name=f"{line['id']}:{quantity}",
        expected_bytes=expected["peak_r512"],
        simulated_bytes=step.nbytes,
        error_pct=error,
        phase_expected=expected.get("phase"),
        phase_simulated=PHASES[step.phase],
    )


def step_of(report: Report, quantity: str) -> StepPeak:
    """The step that the oracle calls `quantity`."""
    return report.cold if quantity == "first_iteration" else report.steady


def oracle_case(line: Mapping[str, Any]) -> tuple[ModelSpec, Training, list[Strategy]]:
    """The model, workload and strategies of one case.

    Raises:
        UnsupportedError: a mode, family or option that is not simulated yet.
    """
    case = line["case"]
    _refuse(case)
    model = spec_from_class(line["config_class"], _config(line), str(line["id"]))
    strategies: list[Strategy] = [FullCheckpointing()] if case.get("checkpointing") else []
    return model, _training(case), strategies


def _refuse(case: Mapping[str, Any]) -> None:
    if case.get("mode", "train") != "train":
        raise UnsupportedError(f"mode {case['mode']!r} is not simulated yet, only training")
    if case.get("lora"):
        raise UnsupportedError("LoRA is not simulated yet, only full training")
    unknown = sorted(set(case) - _USED - _HARMLESS)
    if unknown:
        raise UnsupportedError(f"case option {unknown[0]!r} is not known")


def _config(line: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's keys; ``dropout_off`` sets every dropout rate of the class to zero."""
    config = dict(line["config"])
    if line["case"].get("dropout_off"):
        config |= dict.fromkeys(_DROPOUT_RATES.get(line["config_class"], ()), 0.0)
    return config


def _training(case: Mapping[str, Any]) -> Training:
    autocast = case.get("autocast")
    return Training(
        micro_batch=case.get("batch", 1),
        seq_len=case.get("seq", 128),
        gradient_accumulation=case.get("grad_accum", 1),
        weights=_dtype(case.get("dtype", "fp32")),
        autocast=_dtype(autocast) if autocast else None,
        optimizer=_optimizer(case.get("optimizer") or {}),
        attention=case.get("attn", "sdpa"),
        sdpa_backend=case.get("sdpa_backend", "auto"),
        attention_mask="full" if case.get("attention_mask") else "none",
        keep_outputs=bool(case.get("keep_outputs")),
        clip=case.get("clip"),
        zero_grad=case.get("zero_grad", "none"),
        # the oracle runs a CPU build of torch: it has no fused silu_backward, and cannot see inside kernels
        fused_activation_backward=False,
        kernel_workspace=False,
    )


def _dtype(name: str) -> Any:
    if name not in TRAINING_DTYPES:
        raise UnsupportedError(f"dtype {name!r} is not simulated")
    return dtype(name)


def _optimizer(options: Mapping[str, Any]) -> Optimizer:
    known = {field.name for field in attrs.fields(Optimizer)} | {"impl"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UnsupportedError(f"optimizer option {unknown[0]!r} is not simulated")
    values = {key: value for key, value in options.items() if key != "impl"}
    if "impl" in options and options.get("name") != "adafactor_hf":  # which has one way to run, whatever is asked
        values["implementation"] = _IMPLEMENTATIONS.get(options["impl"], options["impl"])
    return Optimizer(**values)


def role_difference(line: Mapping[str, Any], quantity: str, report: Report) -> float:
    """Largest difference of bytes by role at the peak, as a share of the peak.

    The oracle counts bytes before rounding, so storages smaller than 512 B leave a small difference.
    """
    expected: dict[str, int] = {}
    for category, nbytes in line[quantity]["categories"].items():
        name = "forward" if category in _FORWARD_CATEGORIES else category
        expected[name] = expected.get(name, 0) + nbytes
    found: dict[str, int] = {}
    for role, nbytes in step_of(report, quantity).by_role.items():
        found[CATEGORIES[role]] = found.get(CATEGORIES[role], 0) + nbytes
    largest = max(abs(expected.get(name, 0) - found.get(name, 0)) for name in expected | found)
    return largest / int(line[quantity]["peak_r512"])
