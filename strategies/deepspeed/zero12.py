"""ZeRO-1 and ZeRO-2 of DeepSpeed: flat weights on every rank; optimizer state, and gradients, of a partition.

Technique: Rajbhandari et al., arXiv:1910.02054, sections 5.1 (P_os) and 5.2 (P_os+g).
Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage_1_and_2.py (function named per method).
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from hardware.dtypes import BF16, FP32, DType
from hardware.errors import UnsupportedError, UsageError
from simulator.host import HostMemory
from simulator.plan import Plan, RankClass
from simulator.runtime import Job, Runtime
from strategies.deepspeed.bf16_optimizer import Bf16OptimizerRuntime
from strategies.deepspeed.partition import Arrival, Bucket, FlatBuffer, Flush, layer_kinds
from strategies.deepspeed.zero12_offload import OffloadedZeroRuntime, check_offload, offloaded
from strategies.deepspeed.zero12_runtime import ZeroRuntime
from strategies.flat import Member
from strategies.options import count, flag, later, option, training_dtype
from strategies.rules import refuse_second_owner

#: deepspeed/runtime/zero/config.py `DeepSpeedZeroConfig`: ``reduce_bucket_size``, in elements.
BUCKET_ELEMENTS = 500_000_000
#: Where DeepSpeed documents offloading.
OFFLOAD = "deepspeed/runtime/zero/offload_config.py"
#: Optimizers that work on one flat parameter as on any other.
OPTIMIZERS = ("adam", "adamw", "sgd")


@attrs.frozen(kw_only=True)
class ZeroOptions:
    """What both stages have in common: options with the defaults of `DeepSpeedZeroConfig`, and their checks."""

    reduce_bucket_size: int = option(BUCKET_ELEMENTS, count(1), "elements that are reduced at once; a bucket's size")
    overlap_comm: bool = option(False, flag, "a second bucket is filled while the first is reduced")
    contiguous_gradients: bool = option(True, flag, "gradients are copied into the bucket as they arrive")
    reduce_scatter: bool = option(True, flag, "reduce slices to the ranks that own them, not the whole bucket")
    allgather_bucket_size: int = option(
        BUCKET_ELEMENTS, count(0), "nothing where torch has all_gather_into_tensor: weights are gathered in place"
    )
    round_robin_gradients: bool = option(False, flag, "order weights so that ranks take turns in the reduction")
    offload_optimizer: str = option("none", later(("none", "cpu"), "nvme"), "where optimizer state is kept", OFFLOAD)
    pin_memory: bool = option(True, flag, "what is offloaded is in page-locked host memory", OFFLOAD)
    axis: ClassVar[str] = "dp_shard"
    stage: ClassVar[int]
    name: str = attrs.field(init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with flat weights and partitioned optimizer state (and gradients)."""
        check(plan, self.name)
        if self.round_robin_gradients or not self.contiguous_gradients:
            wrong = "round_robin_gradients" if self.round_robin_gradients else "contiguous_gradients"
            raise UnsupportedError(f"{wrong!r} {str(getattr(self, wrong)).lower()} is not modelled; leave it out")
        if self.offload_optimizer == "cpu":
            check_offload(plan, self.name)
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
        return ZeroRuntime(job, self) if self.offload_optimizer == "none" else OffloadedZeroRuntime(job, self)

    def host(self, plan: Plan) -> HostMemory:
        """What a rank keeps in host memory."""
        if self.offload_optimizer == "none":
            return HostMemory()
        return offloaded(plan, pinned=self.pin_memory, sums=self.stage == 2)


@attrs.frozen(kw_only=True)
class DeepSpeedZero1(ZeroOptions):
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
        if self.offload_optimizer != "none":
            raise UnsupportedError("'offload_optimizer' with 'grad_accum_dtype' fp32 is not modelled: leave one out")
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
class DeepSpeedZero2(ZeroOptions):
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
