"""ZeRO-1 and ZeRO-2 of DeepSpeed: flat weights on every rank; optimizer state, and gradients, of a partition.

Technique: Rajbhandari et al., arXiv:1910.02054, sections 5.1 (P_os) and 5.2 (P_os+g).
Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage_1_and_2.py (function named per method).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs

from hardware.dtypes import BF16, FP32, FP64, DType
from hardware.errors import UnsupportedError, UsageError
from simulator.graph import COMPUTE, Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import Plan, RankClass
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import size_of
from strategies.deepspeed.bf16_optimizer import Bf16OptimizerRuntime
from strategies.deepspeed.partition import Arrival, Bucket, FlatBuffer, Flush, flat_size, layer_kinds, partition_dim
from strategies.flat import Member
from strategies.options import count, flag, later, option, training_dtype
from strategies.rules import refuse_second_owner

#: deepspeed/runtime/zero/config.py `DeepSpeedZeroConfig`: ``reduce_bucket_size``, in elements.
BUCKET_ELEMENTS = 500_000_000
#: Where DeepSpeed documents offloading.
OFFLOAD = "deepspeed/runtime/zero/offload_config.py"
#: Optimizers that work on one flat parameter as on any other.
OPTIMIZERS = ("adam", "adamw", "sgd")
REDUCTION = "reduction"


@attrs.frozen(kw_only=True)
class _ZeroOneTwo:
    """What both stages have in common: options with the defaults of `DeepSpeedZeroConfig`, and their checks."""

    reduce_bucket_size: int = option(BUCKET_ELEMENTS, count(1), "elements that are reduced at once; a bucket's size")
    overlap_comm: bool = option(False, flag, "a second bucket is filled while the first is reduced")
    contiguous_gradients: bool = option(True, flag, "gradients are copied into the bucket as they arrive")
    reduce_scatter: bool = option(True, flag, "reduce slices to the ranks that own them, not the whole bucket")
    allgather_bucket_size: int = option(
        BUCKET_ELEMENTS, count(0), "nothing where torch has all_gather_into_tensor: weights are gathered in place"
    )
    round_robin_gradients: bool = option(False, flag, "order weights so that ranks take turns in the reduction")
    offload_optimizer: str = option("none", later("none", "cpu", "nvme"), "where optimizer state is kept", OFFLOAD)
    axis: ClassVar[str] = "dp_shard"
    stage: ClassVar[int]
    name: str = attrs.field(init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with flat weights and partitioned optimizer state (and gradients)."""
        check(plan, self.name)
        if self.round_robin_gradients or not self.contiguous_gradients:
            wrong = "round_robin_gradients" if self.round_robin_gradients else "contiguous_gradients"
            raise UnsupportedError(f"{wrong!r} {str(getattr(self, wrong)).lower()} is not modelled; leave it out")
        kinds = layer_kinds(plan, self.reduction(FlatBuffer(plan), plan)[0])
        return attrs.evolve(plan, hooks=(*plan.hooks, self), layer_kinds=kinds)

    def reduction(self, flat: FlatBuffer, plan: Plan) -> tuple[dict[Member, Arrival], Flush | None]:
        """What the arrival of each gradient does to the bucket; stage 1 reduces after backward, unless it overlaps."""
        bucket = Bucket(
            flat,
            self.reduce_bucket_size,
            plan.rank,
            scatters=self.reduce_scatter,
            keeps_foreign=self.stage == 1,
        )
        return bucket.arrivals(flat.arrivals if self.reduces_in_backward else flat.members)

    @property
    def reduces_in_backward(self) -> bool:
        """`process_gradients`: whether hooks of the gradients reduce them."""
        return self.stage == 2 or self.overlap_comm

    def rank_classes(self, plan: Plan) -> list[RankClass]:
        """Ranks by the gradients of whole weights that their partitions touch, the fullest first."""
        return classes(plan)

    def start(self, job: Job) -> Runtime:
        """Flatten the weights, and copy the rank's partition to fp32."""
        return ZeroRuntime(job, self)


@attrs.frozen(kw_only=True)
class DeepSpeedZero1(_ZeroOneTwo):
    """`DeepSpeedZeroOptimizer` with ``stage: 1``: gradients are reduced when all of them are there."""

    grad_accum_dtype: DType | None = option(
        None, training_dtype, "fp32 with bf16 weights is BF16_Optimizer; none is the weights' own type"
    )
    stage: ClassVar[int] = 1
    name: str = attrs.field(default="deepspeed_zero1", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with flat weights and partitioned optimizer state."""
        weights, wanted = plan.training.weights, self.grad_accum_dtype
        if wanted in (None, weights):
            return super().__call__(plan)
        if (weights, wanted) != (BF16, FP32):
            raise UnsupportedError(f"'grad_accum_dtype' {wanted} with {weights} weights is not modelled; leave it out")
        check(plan, self.name)
        return attrs.evolve(plan, hooks=(*plan.hooks, self))

    def start(self, job: Job) -> Runtime:
        """`_do_optimizer_sanity_check`: which of DeepSpeed's optimizers it is."""
        own = self.grad_accum_dtype in (None, job.plan.training.weights)
        return super().start(job) if own else Bf16OptimizerRuntime(job)

    def rank_classes(self, plan: Plan) -> list[RankClass]:
        """With `BF16_Optimizer` all ranks are alike."""
        if self.grad_accum_dtype in (None, plan.training.weights):
            return super().rank_classes(plan)
        return [RankClass(f"all {plan.mesh.world} ranks", plan.mesh.world, plan.rank)]


@attrs.frozen(kw_only=True)
class DeepSpeedZero2(_ZeroOneTwo):
    """`DeepSpeedZeroOptimizer` with ``stage: 2``: gradients are reduced as backward makes them, and partitioned."""

    stage: ClassVar[int] = 2
    name: str = attrs.field(default="deepspeed_zero2", init=False)


def check(plan: Plan, name: str) -> None:
    """What DeepSpeed does not take, or what is not modelled of it."""
    training = plan.training
    refuse_second_owner(plan, name)
    if not 0 <= plan.rank < plan.mesh.dp_shard:
        raise UsageError(f"'rank' must be from 0 to {plan.mesh.dp_shard - 1}, the ranks of dp_shard: {plan.rank}")
    if plan.mesh.dp_replicate > 1 or plan.mesh.tp > 1:
        raise UnsupportedError(f"{name} is modelled over 'dp_shard' alone, not on {plan.mesh}")
    if training.optimizer.name not in OPTIMIZERS:
        raise UnsupportedError(
            f"optimizer {training.optimizer.name} on flat partitions is not modelled with {name}; "
            f"use one of {', '.join(OPTIMIZERS)}"
        )
    if training.autocast is not None:
        raise UnsupportedError(f"{name} with autocast is not modelled: use bf16 or fp16 weights")
    if training.zero_grad != "none":
        raise UnsupportedError(f"'zero-grad' must be none with {name}: DeepSpeed clears gradients itself")


def classes(plan: Plan) -> list[RankClass]:
    """Ranks with equally many elements in the weights that touch their partition, the fullest first."""
    flat = FlatBuffer(plan)
    by_elements: dict[int, list[int]] = {}
    for rank in range(flat.ranks):
        by_elements.setdefault(sum(member.elements for member in flat.own(rank)), []).append(rank)
    return [RankClass.of(ranks) for _, ranks in sorted(by_elements.items(), reverse=True)]


@attrs.define(eq=False)
class _Kept:
    """Buffers that outlive a micro-batch."""

    buckets: list[Storage] = attrs.field(factory=list)
    partition: Storage | None = None


class ZeroRuntime(Runtime):
    """`DeepSpeedZeroOptimizer`."""

    clips = True

    def __init__(self, job: Job, options: _ZeroOneTwo) -> None:
        super().__init__(job)
        self.options = options
        training = job.plan.training
        self._dtype = training.weights
        self._stream = REDUCTION if options.overlap_comm else COMPUTE
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
        job.keep_instead([self._persistent("flat parameters", self._dtype, Role.PARAMETER), self._master])

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
            self._flush(arrival.flush)
        gradient = self.job.gradients.pop(parameter)
        if arrival.oversized:
            self._oversized.append(gradient)
        else:
            self.job.free(gradient)

    def _flush(self, flush: Flush) -> None:
        """`reduce_ipg_grads`: reduce, keep the rank's own gradients, let go of the others."""
        slot = self.job.recorder.slot
        for number, elements in enumerate(flush.copies):
            size = size_of((elements,), self._dtype.bits)
            copy = buffer(f"allreduce_bucket.{number}", size, self._dtype, Role.REDUCE, slot, self._stream)
            self.job.allocate("cat", copy)
            self.job.free(copy)
        if flush.opens_partition:
            self._open_partition()
        if flush.releases:
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
            self._flush(self._end)
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
