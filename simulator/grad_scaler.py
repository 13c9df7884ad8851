"""Loss scaling (Micikevicius et al., arXiv 1710.03740, section 3.2) by torch's dynamic scaler, for gradients in fp16.

Source: torch/amp/grad_scaler.py `GradScaler`; the loop is that of its documentation: ``scaler.scale(loss).backward()``,
``scaler.unscale_(optimizer)`` before clipping, ``scaler.step(optimizer)``, ``scaler.update()``. No gradient is
infinite, so that no step is skipped: a skipped one needs less.
"""

from __future__ import annotations

from hardware.dtypes import FP32, FP64, INT32, DType
from simulator.autograd import Autograd
from simulator.graph import Storage, Tensor, make_storage
from simulator.optimizers.step import OptimizerStep
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn


class GradScaler(Runtime):
    """``torch.amp.GradScaler()`` around backward and the optimizer."""

    cold_differs = True

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        training = job.plan.training
        self._fused = training.optimizer.implementation == "fused"  # `_step_supports_amp_scaling`
        self._unscales = training.clip is not None or not self._fused
        self._temporaries: dict[str, Storage] = {}

    def begin_backward(self, turn: Turn) -> None:
        """`scale`: the first call makes the scale and the growth tracker; the product lives while backward runs."""
        if turn.cold and turn.first:
            self.job.allocate("full.default", _scalar("grad_scaler.scale", FP32, Role.BUFFER))
            self.job.allocate("full.default", _scalar("grad_scaler.growth_tracker", INT32, Role.BUFFER))
        self._temporaries["product"] = product = _scalar("grad_scaler.scaled_loss", FP32, Role.BACKWARD)
        self.job.allocate("mul.Tensor", product)

    def seed(self, engine: Autograd, gradient: Tensor) -> Tensor:
        """The backward of the product: the loss's gradient is the scale."""
        return engine.like("mul.Tensor", gradient)

    def end_backward(self) -> None:
        """``backward()`` returns."""
        self.job.free(self._temporaries.pop("product"))

    def before_step(self, step: OptimizerStep) -> None:
        """`unscale_` divides the gradients in place; a fused optimizer does that itself, so they are only checked."""
        if self._unscales:
            double = self._make(step, "_to_copy.default", "double", FP64)
            reciprocal = self._make(step, "reciprocal.default", "reciprocal", FP64)
            step.free([double])
            self._make(step, "_to_copy.default", "inv_scale")
            step.free([reciprocal])
        else:
            self._make(step, "full.default", "inv_scale")
        self._make(step, "full.default", "found_inf")
        self._make(step, "_to_copy.default", "found_inf_on_device")  # `_MultiDeviceReplicator.get` copies in any case
        self._make(step, "_to_copy.default", "inv_scale_on_device")
        step.free([self._temporaries.pop(name) for name in ("inv_scale_on_device", "inv_scale", "found_inf")])

    def before_group(self, step: OptimizerStep) -> None:
        """A fused optimizer is handed the sum over devices and, unless gradients are unscaled, the scale."""
        if self._fused:
            self._make(step, "add.Tensor", "optimizer.found_inf")
            if not self._unscales:
                self._make(step, "mul.Tensor", "optimizer.grad_scale")

    def after_group(self, step: OptimizerStep) -> None:
        """They are taken from it again."""
        names = ("optimizer.grad_scale", "optimizer.found_inf")
        step.free([self._temporaries.pop(name) for name in names if name in self._temporaries])

    def after_step(self, step: OptimizerStep) -> None:
        """`update` forgets what was found."""
        step.free([self._temporaries.pop("found_inf_on_device")])

    def _make(self, step: OptimizerStep, op: str, name: str, dtype: DType = FP32) -> Storage:
        self._temporaries[name] = made = _scalar(f"grad_scaler.{name}", dtype, Role.OPTIMIZER)
        step.allocate(op, made)
        return made


def _scalar(label: str, dtype: DType, role: Role) -> Storage:
    return make_storage(label, (), dtype, role)
