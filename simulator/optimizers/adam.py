"""Adam (arXiv 1412.6980) and AdamW (arXiv 1711.05101) as torch runs them."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.optimizers.step import OptimizerStep


def adamw(step: OptimizerStep) -> None:
    """``torch.optim.AdamW.step`` (torch/optim/adam.py `_init_group`, `_multi_tensor_adam`, `_fused_adam`)."""
    _states(step)
    if step.optimizer.implementation == "foreach":
        step.free(step.temporaries("_foreach_sqrt.default"))


def _states(step: OptimizerStep) -> None:
    """Two moments like the weight; the fused kernel also wants its step count on the device."""
    for parameter in step.parameters:
        if step.optimizer.implementation == "fused":
            step.state(parameter, "step", (), FP32, "zeros.default")
        for moment in ("exp_avg", "exp_avg_sq"):
            step.state(parameter, moment, parameter.dims, parameter.dtype, "zeros_like.default")
