"""ZeRO-Offload: ZeRO-1 and ZeRO-2 whose fp32 partition, its gradient and the optimizer state are in host memory.

Technique: Ren et al., arXiv:2101.06840, section 3.
Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage_1_and_2.py with ``offload_optimizer`` (function named per
method), whose optimizer is `DeepSpeedCPUAdam` (deepspeed/ops/adam/cpu_adam.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hardware.dtypes import FP32, FP64
from hardware.errors import UnsupportedError
from simulator.graph import Storage
from simulator.host import HostMemory
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Turn, buffer
from simulator.sizes import size_of
from strategies.deepspeed.partition import FlatBuffer, Flush
from strategies.deepspeed.zero12_runtime import ZeroRuntime

if TYPE_CHECKING:
    from strategies.deepspeed.zero12 import ZeroOptions

#: Those that `DeepSpeedCPUAdam` runs, with two states in fp32 for each element.
CPU_OPTIMIZERS = ("adam", "adamw")
STATES = 2


class OffloadedZeroRuntime(ZeroRuntime):
    """`DeepSpeedZeroOptimizer` with `cpu_offload`: gradients leave the device as their bucket is reduced."""

    def __init__(self, job: Job, options: ZeroOptions) -> None:
        super().__init__(job, options)
        self.last_differs = job.plan.training.gradient_accumulation > 1
        self._boundary = True
        self._waiting: list[Storage] = []

    def residents(self) -> list[Storage]:
        """The flat weights, and ``temp_grad_buffer_for_gpu_offload``: as large as the largest weight."""
        largest = max(member.elements for member in FlatBuffer(self.job.plan).members)
        dtype = self.job.plan.training.weights
        fetched = buffer("temp_grad_buffer_for_gpu_offload", size_of((largest,), dtype.bits), dtype, Role.BUCKET)
        fetched.persistent = True
        return [self.flat_parameters, fetched]

    def begin_backward(self, turn: Turn) -> None:
        """Gradients are summed in host memory up to the last micro-batch of a step, and then become fp32."""
        super().begin_backward(turn)
        self._boundary = turn.last

    def bypass(self, gradient: Storage) -> Storage:
        """A gradient too large for the bucket is copied, so that its storage is nobody else's."""
        copy = buffer(f"{gradient.label}.clone", gradient.size, gradient.dtype, Role.GRADIENT, gradient.slot)
        self.job.allocate("clone", copy)
        self.job.free(gradient)
        return copy

    def flush(self, flush: Flush) -> None:
        """`reduce_ipg_grads`, `copy_grads_in_partition`: at the boundary the norm, and a copy in fp32 for the host."""
        self.scatter(flush)
        if flush.own and self._boundary:
            slot = self.job.recorder.slot
            norm = buffer("norm", size_of((flush.own,), FP64.bits), FP64, Role.REDUCE, slot, self.stream)
            self.job.allocate("set_norm_for_param_grad_in_gpu", norm)
            self.job.free(norm)
        self.let_go(releases=flush.releases and (self._boundary or not flush.own))

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """None on the device."""
        return []

    def before_step(self, step: OptimizerStep) -> None:
        """The norms are there, the gradients in host memory."""


def check_offload(plan: Plan, name: str) -> None:
    """Refuse what `DeepSpeedCPUAdam` does not run."""
    if plan.training.optimizer.name not in CPU_OPTIMIZERS:
        raise UnsupportedError(
            f"'offload_optimizer' cpu of {name} runs {' and '.join(CPU_OPTIMIZERS)} (DeepSpeedCPUAdam), not "
            f"{plan.training.optimizer.name}: choose one of them or leave it out"
        )


def offloaded(plan: Plan, *, pinned: bool, sums: bool) -> HostMemory:
    """What `DeepSpeedZeroOptimizer` keeps in host memory: all but the optimizer's states is pinned where asked for.

    The fp32 partition and its gradient, the partition once more as the weights are, room for one gradient, and with
    several micro-batches the sums of all gradients that touch the partition, whole: stage 1 sums on the device.
    """
    flat, training = FlatBuffer(plan), plan.training
    whole = sum(member.elements for member in flat.own(plan.rank)) if sums and training.gradient_accumulation > 1 else 0
    low = flat.partition + max(member.elements for member in flat.members) + whole
    copies = _nbytes(2 * flat.partition, FP32.bits) + _nbytes(low, training.weights.bits)
    states = _nbytes(STATES * flat.partition, FP32.bits)
    return HostMemory(pinned=copies, pageable=states) if pinned else HostMemory(pageable=copies + states)


def _nbytes(elements: int, bits: int) -> int:
    return int(size_of((elements,), bits).nbytes({}))
