"""The choice of an optimizer: its name, its implementation and the options that change memory."""

from __future__ import annotations

import attrs

from hardware.errors import UsageError, unknown_name

LARGEST_RANK = 2**20

#: Optimizers, and the ways torch (or transformers) can run each; the first is its default on a GPU.
IMPLEMENTATIONS = {
    "adam": ("foreach", "fused", "for-loop"),
    "adamw": ("foreach", "fused", "for-loop"),
    "sgd": ("foreach", "fused", "for-loop"),
    "adafactor": ("foreach", "for-loop"),
    "adafactor_hf": ("for-loop",),
    "adagrad": ("foreach", "fused", "for-loop"),
    "rmsprop": ("foreach", "for-loop"),
    "lion": ("for-loop",),
    "muon": ("for-loop",),
    "adamw_8bit": ("for-loop",),
    "adamw_paged": ("for-loop",),
    "adamw_8bit_paged": ("for-loop",),
    "lion_8bit": ("for-loop",),
    "adam_mini": ("for-loop",),
    "galore_adamw": ("for-loop",),
    "apollo_adamw": ("for-loop",),
}
#: Options that some optimizers have, and those that have them; every optimizer has the others.
OPTIONS = {
    "momentum": ("sgd", "rmsprop"),
    "nesterov": ("sgd",),
    "amsgrad": ("adam", "adamw"),
    "centered": ("rmsprop",),
    "rank": ("galore_adamw", "apollo_adamw"),
    "scale_type": ("apollo_adamw",),
    "maximize": ("adam", "adamw", "sgd", "adagrad", "rmsprop"),
}
#: What APOLLO has one step size for; the first is the default of transformers' Trainer.
SCALE_TYPES = ("channel", "tensor")
#: Optimizers whose rule needs each weight as the model has it.
WHOLE_WEIGHTS = (
    *("adagrad", "muon", "adam_mini", "galore_adamw", "apollo_adamw"),
    *("adamw_8bit", "adamw_paged", "adamw_8bit_paged", "lion_8bit"),
)
#: Optimizers whose code asks how many GPUs the machine has.
ONE_DEVICE = ("adam_mini",)
#: Optimizers whose big states are managed memory, which the driver moves between host and device.
PAGED = ("adamw_paged", "adamw_8bit_paged")
#: Weight decay when none is given (the defaults of the classes' constructors); what matters is whether it is zero.
_DEFAULT_WEIGHT_DECAY = {"adamw": 0.01}
#: transformers trainer_optimizer.py `_get_galore_optimizer`, `_get_apollo_optimizer`.
_DEFAULT_RANK = 128


def _one_implementation(optimizer: Optimizer) -> str:
    return IMPLEMENTATIONS.get(str(optimizer.name), ("foreach",))[0]


def _default_weight_decay(optimizer: Optimizer) -> float:
    return _DEFAULT_WEIGHT_DECAY.get(str(optimizer.name), 0.0)


def _default_rank(optimizer: Optimizer) -> int:
    return _DEFAULT_RANK if optimizer.name in OPTIONS["rank"] else 0


def _default_scale_type(optimizer: Optimizer) -> str:
    return SCALE_TYPES[0] if optimizer.name in OPTIONS["scale_type"] else ""


def _known_optimizer(_: Optimizer, __: attrs.Attribute[str], value: object) -> None:
    if not isinstance(value, str) or value not in IMPLEMENTATIONS:
        raise unknown_name("optimizer", value, IMPLEMENTATIONS)


def _known_implementation(optimizer: Optimizer, _: attrs.Attribute[str], value: object) -> None:
    known = IMPLEMENTATIONS[optimizer.name]
    if value not in known:
        raise unknown_name(f"implementation of {optimizer.name}", value, known)


def _foreign(option: str, optimizer: Optimizer) -> UsageError:
    owners = ", ".join(OPTIONS[option])
    return UsageError(f"'{option}' belongs to {owners}, not to {optimizer.name}; leave it out")


def _whole_rank(optimizer: Optimizer, _: attrs.Attribute[int], value: object) -> None:
    if optimizer.name in OPTIONS["rank"]:
        check_count("rank", value, LARGEST_RANK)
    elif value != 0:
        raise _foreign("rank", optimizer)


def _known_scale_type(optimizer: Optimizer, _: attrs.Attribute[str], value: str) -> None:
    if optimizer.name in OPTIONS["scale_type"]:
        check_name("scale_type", value, SCALE_TYPES)
    elif value:
        raise _foreign("scale_type", optimizer)


def _finite_not_negative(_: Optimizer, attribute: attrs.Attribute[float], value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise UsageError(f"'{attribute.name}' must be a finite number >= 0: {value!r}")


def _true_or_false(_: Optimizer, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"'{attribute.name}' must be True or False: {value!r}")


@attrs.frozen(kw_only=True)
class Optimizer:
    """An optimizer and how it is run; every field changes memory.

    `implementation` is ``foreach`` (all parameters at once: temporaries as big as all of them),
    ``fused`` (none) or ``for-loop`` (one parameter after the other).

    Raises:
        UsageError: an unknown name, a way to run that the optimizer does not have, or an option of another one.
    """

    name: str = attrs.field(default="adamw", validator=_known_optimizer)
    implementation: str = attrs.field(
        default=attrs.Factory(_one_implementation, takes_self=True), validator=_known_implementation
    )
    momentum: float = attrs.field(default=0.0, validator=_finite_not_negative)
    nesterov: bool = attrs.field(default=False, validator=_true_or_false)
    weight_decay: float = attrs.field(
        default=attrs.Factory(_default_weight_decay, takes_self=True), validator=_finite_not_negative
    )
    amsgrad: bool = attrs.field(default=False, validator=_true_or_false)
    centered: bool = attrs.field(default=False, validator=_true_or_false)
    maximize: bool = attrs.field(default=False, validator=_true_or_false)
    rank: int = attrs.field(default=attrs.Factory(_default_rank, takes_self=True), validator=_whole_rank)
    """Rows or columns that gradients are projected to; 0 of an optimizer that projects none."""
    scale_type: str = attrs.field(
        default=attrs.Factory(_default_scale_type, takes_self=True), validator=_known_scale_type
    )
    """What APOLLO has one step size for: a ``channel`` or a ``tensor``."""

    def __attrs_post_init__(self) -> None:
        for option, owners in OPTIONS.items():
            if getattr(self, option) and self.name not in owners:
                raise _foreign(option, self)
        if self.nesterov and not self.momentum:
            raise UsageError("'nesterov' needs a momentum above 0: set 'momentum', 0.9 for instance")


def check_count(field: str, value: object, largest: int) -> None:
    """Refuse what is no whole number from 1 to `largest`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise UsageError(f"'{field}' must be a whole number from 1 to {largest}: {value!r}")


def check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not `known`."""
    if value not in known:
        raise unknown_name(field, value, known)
