"""The options of the optimizer and of what goes with it: reading them, and what is assumed where they are left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from hardware.dtypes import FP16, DType
from hardware.errors import UsageError, unknown_name
from simulator.plan import Strategy
from simulator.workload import MEGATRON, OPTIONS, PAGED, Optimizer

if TYPE_CHECKING:
    from studies.options import TrainingOptions

_PROJECTED = (
    "the matrices of the layers are projected (optim_target_modules attn, mlp), and each step renews the projections"
)
#: What is assumed with an optimizer whatever its options are.
_LEFT_OPEN: dict[str, tuple[str, ...]] = {
    "galore_adamw": (_PROJECTED, "what cuSOLVER's SVD allocates beyond a copy of its input is not counted"),
    "apollo_adamw": (_PROJECTED,),
    **dict.fromkeys(
        PAGED, ("paged optimizer states are on the host: on the device they take what other tensors leave",)
    ),
}


def parse_optimizer(text: str) -> Optimizer:
    """``NAME[,option=value...]``, for instance ``adamw,implementation=fused`` or ``sgd,momentum=0.9``."""
    name, *settings = text.split(",")
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"'optimizer' options are written NAME,option=value,...: {setting!r}")
        if key in values:
            raise UsageError(f"'optimizer' must name {key!r} once: {text!r}")
        values[key] = _typed(key, value)
    return Optimizer(name=name, **values)


def _typed(key: str, value: str) -> Any:
    types = {field.name: type(getattr(Optimizer(), field.name)) for field in attrs.fields(Optimizer)}
    types.pop("name")
    if key not in types:
        raise unknown_name("optimizer option", key, types)
    if types[key] is bool:
        if value not in ("true", "false"):
            raise UsageError(f"'{key}' must be true or false: {value!r}")
        return value == "true"
    try:
        return types[key](value)
    except ValueError:
        kind = "whole number" if types[key] is int else "number"
        raise UsageError(f"'{key}' must be a {kind}: {value!r}") from None


def optimizer_assumptions(text: str, optimizer: Optimizer) -> list[str]:
    """What is assumed of `optimizer`, given as `text`."""
    defaults = _defaults(text, optimizer)
    lines = [f"options of --optimizer: {','.join(defaults)}"] if defaults else []
    return [*lines, *_LEFT_OPEN.get(optimizer.name, ())]


def _defaults(text: str, optimizer: Optimizer) -> list[str]:
    """The options that apply to `optimizer` and that `text` leaves out, as one would type them."""
    foreign = {"name", *(option for option, owners in OPTIONS.items() if optimizer.name not in owners)}
    given = {setting.partition("=")[0] for setting in text.split(",")[1:]}
    left_out = [field.name for field in attrs.fields(Optimizer) if field.name not in foreign | given]
    return [f"{name}={str(getattr(optimizer, name)).lower()}" for name in left_out]


def assume_grad_scaler(
    options: TrainingOptions, autocast: DType | None, optimizer: Optimizer, strategies: Sequence[Strategy]
) -> tuple[bool, list[str]]:
    """Whether gradients are scaled and, where that is not said, the assumption: as transformers' Trainer does it.

    Its ``fp16=True`` is autocast with a scaler (accelerate's `Accelerator` makes it for ``mixed_precision="fp16"``).
    """
    if options.grad_scaler is not None:
        return options.grad_scaler, []
    if autocast != FP16:
        return False, []
    others = [strategy.name for strategy in strategies if strategy.name != "ddp"]
    others += [options.implementation] if options.implementation in MEGATRON else []
    others += [optimizer.name] if optimizer.name == "muon" else []
    others += ["--optimizer-in-backward"] if options.optimizer_in_backward else []
    if others:
        return False, [f"--no-grad-scaler: the scaler of fp16 with {others[0]} is not modelled"]
    return True, ["--grad-scaler (torch.amp.GradScaler, as with the fp16=True of transformers' Trainer)"]
