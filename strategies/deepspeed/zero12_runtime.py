"""What `DeepSpeedZeroOptimizer` of ZeRO-1 and ZeRO-2 does around a model.

Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage_1_and_2.py (function named per method).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from hardware.dtypes import FP32, FP64, DType
from simulator.graph import COMPUTE, Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import size_of
from strategies.deepspeed.partition import Arrival, FlatBuffer, Flush, flat_size, partition_dim
from strategies.flat import Member

if TYPE_CHECKING:
    from strategies.deepspeed.zero12 import ZeroOptions

REDUCTION = "reduction"


@attrs.define(eq=False)
class _Kept:
    """Buffers that outlive a micro-batch."""

    buckets: list[Storage] = attrs.field(factory=list)
    partition: Storage | None = None


class ZeroRuntime(Runtime):
    """`DeepSpeedZeroOptimizer`."""

    clips = True

    def __init__(self, job: Job, options: ZeroOptions) -> None:
        super().__init__(job)
        self.options = options
        training = job.plan.training
        self._dtype = training.weights
        self.stream = REDUCTION if options.overlap_comm else COMPUTE
        self._waits = options.stage == 1
        self.last_differs = self._waits and training.gradient_accumulation > 1
        self._flat = FlatBuffer(job.plan)
        arrivals, self._end = options.reduction(self._flat, job.plan)
        self._arrivals = self._of_built(arrivals)
        self._kept = _Kept()
        self._oversized: list[Storage] = []
        self._foreign: list[Storage] = []
        self._last = True
        self._opened: Storage | None = None
        self._partition = partition_dim(job)
        size = size_of((self._partition,), FP32.bits)
        self._gradient = buffer("fp32 gradient partition", size, FP32, Role.GRADIENT)
        self._master = self._persistent("fp32 partition", FP32, Role.MASTER_WEIGHT, partition=True)
        self.flat_parameters = self._persistent("flat parameters", self._dtype, Role.PARAMETER)
        job.keep_instead(self.residents())

    def residents(self) -> list[Storage]:
        """What stays on the device of the weights."""
        return [self.flat_parameters, self._master]

    def _of_built(self, arrivals: dict[Member, Arrival]) -> dict[Storage, Arrival]:
        """The arrival of each built weight, in the order of arrival: layers that one stands for are all alike."""
        slots, found = self.job.plan.layout.slots(), {}
        for member, arrival in arrivals.items():
            storage = member.tensor.storage
            assert member.layer is None or slots[member.layer] == storage.slot
            found[storage] = arrival
        return found

    def _persistent(self, label: str, dtype: DType, role: Role, *, partition: bool = False) -> Storage:
        made = buffer(label, flat_size(self.job, dtype.bits, partition=partition), dtype, role)
        made.persistent = True
        return made

    # reduction -----------------------------------------------------------------------------------------------------

    def begin_backward(self, turn: Turn) -> None:
        """Stage 1 reduces at the last micro-batch of a step only."""
        self._last = turn.last or not self._waits

    def accumulated(self, parameter: Storage) -> None:
        """`process_gradients`."""
        self._setup_buckets()
        if self.options.reduces_in_backward and self._last:
            self._arrive(parameter)

    def _setup_buckets(self) -> None:
        """`setup_buckets`: one in full, however small the model; two with `overlap_comm`."""
        if self._kept.buckets:
            return
        size = size_of((self.options.reduce_bucket_size,), self._dtype.bits)
        for number in range(2 if self.options.overlap_comm else 1):
            self._kept.buckets.append(buffer(f"ipg_bucket.{number}", size, self._dtype, Role.BUCKET))
            self.job.allocate("setup_buckets", self._kept.buckets[-1])

    def _arrive(self, parameter: Storage) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`: into the bucket, after flushing it if it is full."""
        arrival = self._arrivals[parameter]
        if arrival.flush is not None:
            self.flush(arrival.flush)
        gradient = self.job.gradients.pop(parameter)
        if arrival.oversized:
            self._oversized.append(self.bypass(gradient))
        else:
            self.job.free(gradient)

    def bypass(self, gradient: Storage) -> Storage:
        """What of a gradient too large for the bucket is reduced: itself."""
        return gradient

    def flush(self, flush: Flush) -> None:
        """`reduce_ipg_grads`: reduce, keep the rank's own gradients, let go of the others."""
        self.scatter(flush)
        if flush.opens_partition:
            self._open_partition()
        self.let_go(releases=flush.releases)

    def scatter(self, flush: Flush) -> None:
        """`average_tensor`: copies of what spans partitions."""
        slot = self.job.recorder.slot
        for number, elements in enumerate(flush.copies):
            size = size_of((elements,), self._dtype.bits)
            copy = buffer(f"allreduce_bucket.{number}", size, self._dtype, Role.REDUCE, slot, self.stream)
            self.job.allocate("cat", copy)
            self.job.free(copy)

    def let_go(self, *, releases: bool) -> None:
        """Gradients too large for the bucket go now, or when backward ends."""
        if releases:
            self.job.free(*self._oversized)
        else:
            self._foreign += self._oversized
        self._oversized.clear()

    def _open_partition(self) -> None:
        """`copy_grads_in_partition`: a buffer for every weight, whole, that touches the rank's partition."""
        elements = sum(member.elements for member in self._flat.own(self.job.plan.rank))
        label = "gradient partition" if self._kept.partition is None else "gradient partition.more"
        self._opened = buffer(label, size_of((elements,), self._dtype.bits), self._dtype, Role.GRADIENT)
        self.job.allocate("copy_grads_in_partition", self._opened)

    def end_backward(self) -> None:
        """`reduce_gradients`, `independent_gradient_partition_epilogue`."""
        recorder = self.job.recorder
        recorder.module, recorder.slot = "reduction", None
        if not self._last:
            return
        if not self.options.reduces_in_backward:
            self._reduce_all()
        recorder.slot = None
        recorder.note("epilogue")
        if self._end is not None:
            self.flush(self._end)
        self._keep_partition()
        self.job.free(*self._foreign, *self._kept.buckets)
        self._foreign.clear()
        self._kept.buckets.clear()

    def _reduce_all(self) -> None:
        """`reduce_gradients`: every gradient in turn, in the order of ``model.parameters()``."""
        for parameter in self._arrivals:
            self.job.recorder.slot = parameter.slot
            self.job.recorder.note("reduce_gradients")
            self._arrive(parameter)

    def _keep_partition(self) -> None:
        """The first partition of gradients stays for the step, later ones are added to it."""
        if self._opened is None:
            return
        if self._kept.partition is None:
            self._kept.partition = self._opened
        else:
            self.job.free(self._opened)
        self._opened = None

    # optimizer -----------------------------------------------------------------------------------------------------

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """One flat parameter: the rank's fp32 partition."""
        return [Parameter(self._master, self._flat_gradient(), ((self._partition,),))]

    def _flat_gradient(self) -> Storage:
        """What the optimizer gets: a single piece in fp32 is neither joined nor cast, it stays where it is."""
        kept = self._kept.partition
        alone = self._dtype == FP32 and len(self._flat.pieces(self.job.plan.rank)) == 1
        return kept if alone and kept is not None else self._gradient

    def before_step(self, step: OptimizerStep) -> None:
        """`step`: the norm, then the partition's gradients in one fp32 tensor; a single piece need not be joined."""
        rank, kept = self.job.plan.rank, self._kept.partition
        pieces, weights = self._flat.pieces(rank), len(self._flat.own(rank))
        held = [] if kept is None or kept is self._flat_gradient() else [kept]
        for elements in pieces[weights:]:
            held.append(buffer("padding", size_of((elements,), self._dtype.bits), self._dtype, Role.GRADIENT))
            step.allocate("zeros", held[-1])
        self._norm(step, max(pieces[:weights], default=0))
        self._join(step, len(pieces))
        step.free(held)

    def _join(self, step: OptimizerStep, pieces: int) -> None:
        """`flatten`, which returns a single piece as it is; then the cast to fp32."""
        copy = buffer("flat gradient", size_of((self._partition,), self._dtype.bits), self._dtype, Role.GRADIENT)
        if self._dtype == FP32:
            if pieces > 1:
                step.allocate("flatten", self._gradient)
            return
        if pieces > 1:
            step.allocate("flatten", copy)
        step.allocate("_to_copy", self._gradient)
        if pieces > 1:
            step.free([copy])

    @staticmethod
    def _norm(step: OptimizerStep, elements: int) -> None:
        """`get_grad_norm_direct`: what the rank owns of each gradient in fp64, one at a time; here the largest."""
        if elements:
            copy = buffer("norm", size_of((elements,), FP64.bits), FP64, Role.OPTIMIZER)
            step.allocate("vector_norm", copy)
            step.free([copy])
