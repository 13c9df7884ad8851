"""Case files of the oracle: reading their lines, and what a line says in our words."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from hardware.dtypes import TRAINING_DTYPES, DType, dtype
from hardware.errors import UnsupportedError, UsageError
from simulator.model import ModelSpec
from simulator.plan import Strategy
from simulator.reading import spec_from_class
from simulator.workload import IMPLEMENTATIONS, OPTIONS, Optimizer, Training
from strategies.activation_offload import ActivationOffload
from strategies.float8 import Float8
from studies.pruning import parse_prunings
from studies.validation.liger_switches import liger_of
from studies.validation.regimes import checkpointing_strategies, freezing_strategies

#: What a line may hold a recorded peak of.
QUANTITIES = ("first_iteration", "steady", "prefill", "decode", "generate")
#: Quantities of a case on several devices -> the keys of its line.
DISTRIBUTED = {"first_iteration": "first_step_peak_bytes", "steady": "peak_bytes"}
_IMPLEMENTATIONS = {"forloop": "for-loop"}
#: Classes with other dropout rates than that of the attention weights.
_DROPOUT_RATES = {
    "GPT2Config": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "Phi3Config": ("resid_pdrop", "embd_pdrop", "attention_dropout"),
}
#: Options of a case that change memory and that we simulate with one value only -> that value.
_FIXED = {"mode": "train", "lora": None, "emulate": True}
#: Where the tensors of a case were: fake ones on a GPU that is not there, or real ones on the CPU.
_DEVICES = (("cuda", True), ("cpu", False))
_SWITCHES = (
    *("keep_outputs", "dropout_off"),
    *("optimizer_in_backward", "grad_scaler", "items_in_batch"),
)
#: What a case says of its padding mask, as JSON -> `Training.attention_mask`.
_MASKS = {"null": "none", "false": "none", "true": "full", '"padded"': "padded"}
_SIMULATED = {"dtype", "autocast", "attn", "sdpa_backend", "experts", "batch", "seq", "grad_accum", "optimizer", "clip"}
_SIMULATED |= {"attention_mask", "expert_imbalance", "zero_grad", "liger", "checkpointing", "freeze", "prune", "float8"}
_SIMULATED |= {"mtp", "save_on_cpu", *_SWITCHES}
#: Options that leave dense training as it is: where to record, inference, the model's name (its line has it).
_HARMLESS = {"timeline", "layers", "logits_to_keep_prefill", "new_tokens"}
_HARMLESS |= {"model", "config_override", "config_class", "config", "tags", "id"}


def read_cases(path: str | Path) -> Iterator[dict[str, Any]]:
    """The cases of a JSON-lines file.

    Raises:
        UsageError: no such file, or a line that is not a case; the line number is named.
    """
    return read_lines(path, _problem)


def read_lines(path: str | Path, problem: Callable[[Any], str | None]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file.

    Args:
        problem: what a line must do that it does not, in words that follow "must"; None of a good one.

    Raises:
        UsageError: no such file, or a line that is not JSON or has a problem; the line number is named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'cases' must be a readable file: {path} ({error.__class__.__name__})") from None
    for number, line in enumerate(text.split("\n"), start=1):  # JSON may hold the other separators of str.splitlines
        if line.strip():
            found = _parse(line, number, path)
            lacks = problem(found)
            if lacks:
                raise UsageError(f"line {number} of {path} must {lacks}")
            yield dict(found)


def _parse(line: str, number: int, path: str | Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"line {number} of {path} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"line {number} of {path} holds a number too long or lists too deep") from None


def _problem(line: Any) -> str | None:
    """What a line lacks to be a case: its name, its workload, and a peak to compare with."""
    if not isinstance(line, dict) or not isinstance(line.get("id", line.get("name")), str):
        return "be an object with an 'id' (or 'name')"
    if "case" not in line:
        return _wrong_peak({key: line[key] for key in DISTRIBUTED.values() if key in line})
    if not (isinstance(line["case"], dict) and isinstance(line.get("config"), dict)):
        return "have objects as 'case' and 'config'"
    if not isinstance(line.get("config_class"), str):
        return "have a name as 'config_class', such as 'LlamaConfig'"
    found = {key: line[key] for key in QUANTITIES if key in line}
    return _wrong_peak({key: value.get("peak_r512") if isinstance(value, dict) else 0 for key, value in found.items()})


def _wrong_peak(peaks: dict[str, Any]) -> str | None:
    if not peaks:
        return f"have a recorded peak: {', '.join(QUANTITIES)}, or of several devices {DISTRIBUTED['steady']}"
    wrong = [key for key, peak in peaks.items() if not (type(peak) is int and peak > 0)]
    return f"have a positive whole number of bytes as the peak of {wrong[0]!r}" if wrong else None


def oracle_case(line: Mapping[str, Any]) -> tuple[ModelSpec, Training, list[Strategy]]:
    """The model, workload and strategies of one case; options it leaves out have the oracle's defaults.

    Raises:
        UnsupportedError: a mode, family or option that is not simulated yet.
        UsageError: one that is wrong.
    """
    case = line["case"]
    _refuse(case)
    model = spec_from_class(line["config_class"], _config(line), str(line["id"]))
    float8 = [Float8(case["float8"])] if case.get("float8") else []
    offload = [ActivationOffload()] if case.get("save_on_cpu") else []
    regimes = [*checkpointing_strategies(case.get("checkpointing")), *freezing_strategies(case.get("freeze"))]
    return model, _training(case, model.family), [*parse_prunings(case.get("prune") or ()), *float8, *offload, *regimes]


def _refuse(case: Mapping[str, Any]) -> None:
    for key, value in _FIXED.items():
        if case.get(key, value) != value:
            raise UnsupportedError(f"{key} {json.dumps(case[key])} is not simulated yet, only {json.dumps(value)}")
    if (case.get("device", "cuda"), case.get("fake", True)) not in _DEVICES:
        raise UnsupportedError("device and fake must be cuda and true, or cpu and false: others are not simulated yet")
    for key in _SWITCHES:
        if case.get(key) not in (None, False, True):
            raise UnsupportedError(f"{key} {json.dumps(case[key])} is not simulated yet, only true and false")
    mask = json.dumps(case.get("attention_mask"))
    if mask not in _MASKS:
        raise UnsupportedError(f"attention_mask {mask} is not simulated yet, only {', '.join(sorted(_MASKS)[1:])}")
    unknown = sorted(set(case) - _SIMULATED - _HARMLESS - {"device", "fake", *_FIXED})
    if unknown:
        raise UnsupportedError(f"case option {unknown[0]!r} is not known")


def _config(line: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's keys; ``dropout_off`` sets every dropout rate of the class to zero."""
    config = dict(line["config"])
    if line["case"].get("dropout_off"):
        config |= dict.fromkeys(_DROPOUT_RATES.get(line["config_class"], ("attention_dropout",)), 0.0)
    return config


def _training(case: Mapping[str, Any], family: str) -> Training:
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
        experts=case.get("experts") or "grouped_mm",
        expert_imbalance=case.get("expert_imbalance", 1.0),
        attention_mask=_MASKS[json.dumps(case.get("attention_mask"))],
        keep_outputs=bool(case.get("keep_outputs")),
        clip=case.get("clip") or None,
        grad_scaler=bool(case.get("grad_scaler")),
        optimizer_in_backward=bool(case.get("optimizer_in_backward")),
        zero_grad=case.get("zero_grad", "none"),
        liger=liger_of(case.get("liger"), family),
        items_in_batch=bool(case.get("items_in_batch")),
        mtp=case.get("mtp", 0),
        # the oracle runs a CPU build of torch: it has no fused silu_backward for fakes, and cannot see inside kernels
        fused_activation_backward=not case.get("fake", True),
        kernel_workspace=False,
        tensor_subclasses=True,
    )


def _dtype(name: Any) -> DType:
    if name not in TRAINING_DTYPES:
        raise UnsupportedError(f"dtype {name!r} is not simulated")
    return dtype(name)


def _optimizer(options: Mapping[str, Any]) -> Optimizer:
    projects = options.get("name") in OPTIONS["rank"]
    known = {field.name for field in attrs.fields(Optimizer)} | {"impl", *(["update_proj_gap"] if projects else [])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UnsupportedError(f"optimizer option {unknown[0]!r} is not simulated")
    if projects and options.get("update_proj_gap") != 1:
        raise UnsupportedError(
            "a step that does not renew its projections is not simulated: 'update_proj_gap' must be 1"
        )
    values = {key: value for key, value in options.items() if key not in ("impl", "update_proj_gap")}
    if len(IMPLEMENTATIONS.get(str(options.get("name", "adamw")), ())) > 1:  # the others run one way, whatever is asked
        implementation = options.get("impl", "foreach")
        values["implementation"] = _IMPLEMENTATIONS.get(implementation, implementation)
    return Optimizer(**values)
