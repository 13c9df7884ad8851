"""What is done with a model: the training step's options, each one that changes memory."""

from __future__ import annotations

import attrs

from hardware.dtypes import FP32, DType
from hardware.errors import UsageError, unknown_name

#: Optimizers, and the ways torch (or transformers) can run each; the first is its default on a GPU.
IMPLEMENTATIONS = {
    "adam": ("foreach", "fused", "for-loop"),
    "adamw": ("foreach", "fused", "for-loop"),
    "sgd": ("foreach", "fused", "for-loop"),
    "adafactor": ("foreach", "for-loop"),
    "adafactor_hf": ("for-loop",),
}
#: Weight decay when none is given (the defaults of the classes' constructors); what matters is whether it is zero.
_DEFAULT_WEIGHT_DECAY = {"adamw": 0.01}


def _one_implementation(optimizer: Optimizer) -> str:
    return IMPLEMENTATIONS.get(optimizer.name, ("foreach",))[0]


def _default_weight_decay(optimizer: Optimizer) -> float:
    return _DEFAULT_WEIGHT_DECAY.get(optimizer.name, 0.0)


@attrs.frozen(kw_only=True)
class Optimizer:
    """An optimizer and how it is run; every field changes memory.

    `implementation` is ``foreach`` (all parameters at once: temporaries as big as all of them),
    ``fused`` (none) or ``for-loop`` (one parameter after the other).
    """

    name: str = "adamw"
    implementation: str = attrs.field(default=attrs.Factory(_one_implementation, takes_self=True))
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = attrs.field(default=attrs.Factory(_default_weight_decay, takes_self=True))
    amsgrad: bool = False

    def __attrs_post_init__(self) -> None:
        if self.name not in IMPLEMENTATIONS:
            raise unknown_name("optimizer", self.name, IMPLEMENTATIONS)
        if self.implementation not in IMPLEMENTATIONS[self.name]:
            raise unknown_name(f"implementation of {self.name}", self.implementation, IMPLEMENTATIONS[self.name])
        for field in ("momentum", "weight_decay"):
            if not getattr(self, field) >= 0:
                raise UsageError(f"'{field}' must be >= 0: {getattr(self, field)}")
        if (self.momentum or self.nesterov) and self.name != "sgd":
            raise UsageError(f"'momentum' and 'nesterov' belong to sgd, not to {self.name}; leave them out")
        if self.nesterov and not self.momentum:
            raise UsageError("'nesterov' needs a momentum above 0: set 'momentum', 0.9 for instance")
        if self.amsgrad and self.name not in ("adam", "adamw"):
            raise UsageError(f"'amsgrad' belongs to adam and adamw, not to {self.name}; leave it out")


@attrs.frozen(kw_only=True)
class Training:
    """One optimizer step of training on one device."""

    micro_batch: int = 1
    seq_len: int = 1024
    gradient_accumulation: int = 1
    weights: DType = FP32
    autocast: DType | None = None
    optimizer: Optimizer = Optimizer()
    attention: str = "sdpa"
    sdpa_backend: str = "auto"
    attention_mask: str = "none"
    """``none``, ``full`` (given, but nothing is padded) or ``padded``."""
    keep_outputs: bool = False
    clip: float | None = None
    zero_grad: str = "none"
    """``none`` (``set_to_none=True``) or ``zero``."""
    torch: tuple[int, int] = (2, 13)
    fused_activation_backward: bool = True
    """False for torch builds without CUDA's fused `silu_backward` (fake-tensor runs on CPU builds)."""
    kernel_workspace: bool = True
    """Count what kernels allocate for themselves (flash attention's backward accumulators)."""
