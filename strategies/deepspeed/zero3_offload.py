"""ZeRO-3 with ``offload_optimizer`` in host memory: fp32 partitions, gradients and states are the host's.

Technique: Rajbhandari et al., ZeRO-Infinity, arXiv:2104.07857, section 5.1.
Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage3.py (function named per method), whose optimizer is
`DeepSpeedCPUAdam` (deepspeed/ops/adam/cpu_adam.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import FP32, FP64, DType
from simulator.graph import Storage
from simulator.host import HostMemory
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import Plan
from simulator.runtime import Turn
from simulator.sizes import FlatSize, size_of
from strategies.deepspeed.coordinator import Weight
from strategies.deepspeed.zero3_optimizer import Partitions
from strategies.deepspeed.zero3_reduce import Reducer
from strategies.deepspeed.zero12_offload import STATES

#: ``_constant_buffered_norm2``: elements of a gradient that are cast at once.
NORM_ELEMENTS = 250_000_000


class OffloadedPartitions(Partitions):
    """The rank's partitions, of which the device keeps the weights alone."""

    @property
    def resident(self) -> list[Storage]:
        """16-bit partitions, and the flag that records overflows."""
        shards, *_, tracker = super().resident
        return [shards, tracker]

    def parameters(self) -> list[Parameter]:
        """None on the device."""
        return []

    def begin(self, step: OptimizerStep) -> None:
        """The norms were taken as the gradients were reduced."""

    def prepare(self, step: OptimizerStep) -> None:
        """A sub-group's gradients in fp32 are in host memory."""


class OffloadingReducer(Reducer):
    """The IPG bucket, whose reduced gradients go to the host one by one."""

    boundary = True
    """Whether the micro-batch is the last of its step."""
    first = True
    """Whether it is the first, whose gradients are not added to others."""

    def fork(self) -> OffloadingReducer:
        """A copy that goes on from here."""
        other = OffloadingReducer(self.job, self.options, self._order)
        other._weights, other._kept = self._weights.copy(), self._kept.copy()
        other.boundary, other.first = self.boundary, self.first
        return other

    def turn(self, turn: Turn) -> None:
        """Gradients of the first micro-batch are not summed; those of the last are handed over."""
        self.first, self.boundary = turn.first, turn.last

    def partition(self, weights: Sequence[Weight]) -> None:
        """`partition_grads`: a copy on the device, on it the norm and the cast for the host.

        Sums are made in it; the name of one holds it until the next is there.
        """
        held: Storage | None = None
        for number, weight in enumerate(weights):
            own = self._own(weight)
            if not own:
                continue
            if held is not None and self.first:
                self.job.free(held)
            copy = self._part(f"from_host.{number}", own, self.options.accumulates)
            self.job.allocate("to", copy)
            if held is not None and not self.first:
                self.job.free(held)
            held = copy
            if self.boundary:
                self._hand_over(number, own)
        if held is not None:
            self.job.free(held)

    def _hand_over(self, number: int, own: int) -> None:
        """`_offload_grad_partition_at_boundary`."""
        casts = [self._part(f"norm.{number}", min(own, NORM_ELEMENTS), FP64)]
        if self.options.accumulates != FP32:
            casts.append(self._part(f"to_host.{number}", own, FP32))
        for cast in casts:
            self.job.allocate("_to_copy", cast)
            self.job.free(cast)

    def _part(self, label: str, elements: int, dtype: DType) -> Storage:
        return self._made(label, FlatSize(((1, (elements,)),), dtype.bits), dtype)


def offloaded(plan: Plan, accumulates: DType, *, pinned: bool) -> HostMemory:
    """What `DeepSpeedZeroOptimizer_Stage3` keeps in host memory: gradients, as summed and in fp32, are pinned."""
    bindings = plan.dimensions.bindings
    places = plan.layout.places
    elements = 0
    for tensor in plan.graph.parameters:
        whole, slot = int(tensor.storage.size.elements(bindings)), tensor.storage.slot
        elements += -(-whole // plan.mesh.dp_shard) * (1 if slot is None else places[slot].repeats)

    def nbytes(copies: int, dtype: DType) -> int:
        return int(size_of((copies, elements), dtype.bits).nbytes({}))

    gradients, others = nbytes(1, FP32) + nbytes(1, accumulates), nbytes(1 + STATES, FP32)
    return HostMemory(pinned=gradients, pageable=others) if pinned else HostMemory(pageable=gradients + others)
