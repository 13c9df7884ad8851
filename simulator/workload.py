"""What is done with a model: the training step's options, each one that changes memory."""

from __future__ import annotations

import attrs

from hardware.dtypes import FP32, DType


@attrs.frozen(kw_only=True)
class Optimizer:
    """An optimizer and how torch runs it.

    `implementation` is ``foreach`` (all parameters at once: temporaries as big as all of them),
    ``fused`` (none) or ``for-loop`` (one parameter after the other).
    """

    name: str = "adamw"
    implementation: str = "foreach"
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float | None = None
    """None: the optimizer's own default."""
    amsgrad: bool = False


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
