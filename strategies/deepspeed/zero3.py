"""ZeRO-3 of DeepSpeed: 16-bit weights, gradients and optimizer state partitioned, weights gathered module by module.

Technique: Rajbhandari et al., arXiv:1910.02054, section 5.3 (P_os+g+p); ZeRO++, Wang et al., arXiv:2306.10209.
Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage3.py and partition_parameters.py (function named per method).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import ClassVar, Self

import attrs

from hardware.dtypes import FP32, FP64, INT8, DType
from hardware.errors import UnsupportedError
from simulator.graph import COMPUTE, Op, Storage, Tensor
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import Dim, FlatSize, size_of
from strategies.deepspeed.coordinator import Coordinator, Limits, Step, Walk, Weight, path_of, visits
from strategies.deepspeed.zero12 import BUCKET_ELEMENTS, OFFLOAD, check
from strategies.options import count, flag, later, option

#: Streams of the coordinator's gathers and of the reduction (stage3.py).
GATHER, REDUCE = "allgather", "reduce_and_partition"


@attrs.frozen(kw_only=True)
class DeepSpeedZero3:
    """`DeepSpeedZeroOptimizer_Stage3`, with the options and defaults of `DeepSpeedZeroConfig`; sizes in elements.

    Every layer is built: what the coordinator gathers ahead and releases differs from layer to layer. With
    activation checkpointing a layer's weights are taken to stay from its recomputation to its backward.
    """

    reduce_bucket_size: int = option(BUCKET_ELEMENTS, count(1), "gradients that are reduced at once; a bucket's size")
    stage3_prefetch_bucket_size: int = option(50_000_000, count(0), "weights gathered ahead at each module")
    stage3_max_live_parameters: int = option(10**9, count(0), "no more are gathered ahead than that are then live")
    stage3_max_reuse_distance: int = option(10**9, count(0), "weights used again within so many are not released")
    stage3_param_persistence_threshold: int = option(100_000, count(0), "weights up to this stay gathered")
    stage3_model_persistence_threshold: int = option(sys.maxsize, count(0, sys.maxsize), "and all of them up to this")
    sub_group_size: int = option(10**9, count(1), "partition elements that the optimizer updates at once")
    overlap_comm: bool = option(True, flag, "gathers and reductions run on streams of their own")
    reduce_scatter: bool = option(True, flag, "reduce slices to their ranks; else all-reduce the bucket in place")
    contiguous_gradients: bool = option(True, flag, "gradients are copied into the bucket as they arrive")
    zero_hpz_partition_size: int = option(1, count(1), "ranks over which a second copy is sharded for backward (hpZ)")
    zero_quantized_weights: bool = option(False, flag, "weights are gathered in int8 (qwZ)")
    zero_quantized_gradients: bool = option(False, flag, "gradients are reduced in int4 (qgZ)")
    offload_optimizer: str = option("none", later("none", "cpu", "nvme"), "where optimizer state is kept", OFFLOAD)
    offload_param: str = option("none", later("none", "cpu", "nvme"), "where partitions of weights are kept", OFFLOAD)
    axis: ClassVar[str] = "dp_shard"
    name: str = attrs.field(default="deepspeed_zero3", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with everything partitioned."""
        check(plan, self.name)
        if self.zero_quantized_gradients or not self.contiguous_gradients:
            wrong = "zero_quantized_gradients" if self.zero_quantized_gradients else "contiguous_gradients"
            raise UnsupportedError(f"{wrong!r} {str(getattr(self, wrong)).lower()} is not modelled; leave it out")
        if plan.mesh.dp_shard % self.zero_hpz_partition_size:
            raise UnsupportedError(
                f"'zero_hpz_partition_size' must divide the {plan.mesh.dp_shard} ranks: {self.zero_hpz_partition_size}"
            )
        notes = ["deepspeed_zero3: weights of a checkpointed layer stay from recomputation to backward"]
        assumptions = (*plan.assumptions, *(notes if plan.recomputed else []))
        return attrs.evolve(plan, hooks=(*plan.hooks, self), unrolled=True, assumptions=assumptions)

    def start(self, job: Job) -> Zero3Runtime:
        """Partition the weights."""
        return Zero3Runtime(job, self)


@attrs.define(eq=False)
class _Kept:
    """What outlives a micro-batch."""

    gathered: bool = False
    """Whether persistent weights are gathered between micro-batches: from the first step's end on."""
    secondary: dict[Weight, Storage] = attrs.field(factory=dict)
    """hpZ's second partitions since the last optimizer step, which drops them (`invalidate_secondary_tensor`)."""


@attrs.define(eq=False)
class _Handle:
    """`AllGatherCoalescedHandle`: its flat buffers live until each of its weights has been waited for."""

    flat: list[Storage]
    weights: list[Weight]
    split: bool = False


class Zero3Runtime(Runtime):
    """`DeepSpeedZeroOptimizer_Stage3`, its coordinator and the hooks of every module."""

    clips = True
    cold_differs = True

    def __init__(self, job: Job, options: DeepSpeedZero3) -> None:
        super().__init__(job)
        self.options = options
        self.first_differs = options.zero_hpz_partition_size > 1
        self._dtype = job.plan.training.weights
        self._streams = (GATHER, REDUCE) if options.overlap_comm else (COMPUTE, COMPUTE)
        self._weights = self._find_weights()
        self._limits = Limits(
            options.stage3_prefetch_bucket_size,
            options.stage3_max_live_parameters,
            options.stage3_max_reuse_distance,
        )
        self._modules, self._trace = self._find_modules()
        self._coordinator = Coordinator(self._modules, None, self._limits)
        self._walk = Walk()
        self._in_model = False
        self._serial = 0
        self._handles: dict[Weight, _Handle] = {}
        self._gathered: dict[Weight, Storage] = {}
        self._kept = _Kept()
        self._keeps = False
        self._bucket: list[Tensor] = []
        self._oversized: list[Storage] = []
        self._secondary = {weight: self._second(weight) for weight in self._weights.values()}
        self._kept_persistent = [
            self._whole(w, "persistent", padded=True) for w in self._weights.values() if w.persists
        ]
        self._groups = self._sub_groups()
        self._set_up()

    # set-up --------------------------------------------------------------------------------------------------------

    def _find_weights(self) -> dict[Storage, Weight]:
        """`mark_persistent_parameters`."""
        bindings, found, total = self.job.plan.dimensions.bindings, {}, 0
        for tensor in self.job.graph.parameters:
            elements = int(tensor.storage.size.elements(bindings))
            persists = (
                elements <= self.options.stage3_param_persistence_threshold
                and elements + total <= self.options.stage3_model_persistence_threshold
            )
            total += elements if persists else 0
            found[tensor.storage] = Weight(tensor.storage, tensor.dims, elements, persists)
        return found

    def _find_modules(self) -> tuple[dict[tuple[Step, ...], tuple[Weight, ...]], list[tuple[Step, ...]]]:
        """The weights of each module, by the ops that read them, and the order of fetches of a micro-batch."""
        owned: dict[tuple[Step, ...], dict[Weight, None]] = {}
        walk = Walk()
        for op in self.job.graph.ops:
            walk.go(path_of(op))
            for tensor in op.inputs:
                if tensor.is_parameter:
                    owned.setdefault(tuple(walk.stack), {})[self._weights[tensor.storage]] = None
        return {path: tuple(weights) for path, weights in owned.items()}, list(visits(self.job.graph))

    def _sub_groups(self) -> list[list[Tensor]]:
        """`_create_fp16_sub_groups`: weights in order, until their partitions fill a group."""
        groups: list[list[Tensor]] = [[]]
        filled = 0
        for tensor in self.job.graph.parameters:
            groups[-1].append(tensor)
            filled += -(-self._weights[tensor.storage].elements // self.job.plan.mesh.dp_shard)
            if filled >= self.options.sub_group_size:
                groups.append([])
                filled = 0
        return [group for group in groups if group]

    def _partition(self, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """One rank's share of a weight's elements, rounded up (partition_parameters.py `_aligned_size`)."""
        return (self.job.plan.dimensions.split(dims, "dp_shard"),)

    def _flat(self, label: str, tensors: Sequence[Tensor], dtype: DType, role: Role) -> Storage:
        """A flat buffer over the partitions of `tensors`."""
        size = FlatSize(tuple((1, self._partition(tensor.dims)) for tensor in tensors), dtype.bits)
        made = buffer(label, size, dtype, role)
        made.persistent = True
        return made

    def _set_up(self) -> None:
        """`_create_fp16_partitions_with_defragmentation`, `_create_fp32_partitions`, `_setup_for_real_optimizer`."""
        weights = self.job.graph.parameters
        ipg = buffer(
            "ipg_bucket", size_of((self.options.reduce_bucket_size,), self._dtype.bits), self._dtype, Role.BUCKET
        )
        ipg.persistent = True
        dimensions = self.job.plan.dimensions
        self._masters: list[Storage] = []
        self._gradients: list[Storage] = []
        self._dims: list[Dim] = []
        for number, group in enumerate(self._groups):
            master = self._flat(f"fp32 partition {number}", group, FP32, Role.MASTER_WEIGHT)
            dim = dimensions.bind(f"sub_group.{number}", master.size.elements(dimensions.bindings))
            self._masters.append(master)
            self._dims.append(dim)
            size = size_of((dim,), FP32.bits)
            self._gradients.append(buffer(f"fp32 gradient {number}", size, FP32, Role.GRADIENT))
        partitions = self._flat("gradient partitions", weights, self._dtype, Role.GRADIENT)
        shards = self._flat("lp_param_buffer", weights, self._dtype, Role.PARAMETER)
        self.job.keep_instead([shards, *self._masters, ipg, partitions])

    # memory of the coordinator -------------------------------------------------------------------------------------

    def _whole(self, weight: Weight, label: str, *, padded: bool) -> Storage:
        """A gathered weight: as all partitions are, or as it is itself."""
        dims = (*self._partition(weight.dims), "dp_shard") if padded else weight.dims
        size = size_of(dims, self._dtype.bits)
        return buffer(f"{weight.storage.label}.{label}", size, self._dtype, Role.GATHERED, weight.storage.slot)

    def _second(self, weight: Weight) -> Storage:
        """What hpZ keeps of a weight for backward."""
        size = FlatSize(((1, weight.dims),), self._dtype.bits, shards=(self.options.zero_hpz_partition_size,))
        label = f"{weight.storage.label}.secondary"
        return buffer(label, size, self._dtype, Role.POST_FORWARD_SHARD, weight.storage.slot)

    def gather(self, weights: Sequence[Weight]) -> None:
        """`all_gather_coalesced`: one weight into its own storage, several into a flat buffer."""
        if len(weights) == 1 and not self.options.zero_quantized_weights:
            (weight,) = weights
            self._gathered[weight] = self._whole(weight, "gathered", padded=True)
            self._gathered[weight].stream = self._streams[0]
            self.job.allocate("_all_gather_sequential", self._gathered[weight])
            return
        dtype = INT8 if self.options.zero_quantized_weights else self._dtype
        handle = _Handle([self._flat_gather(weights, dtype, "all_gather")], list(weights))
        self._handles.update(dict.fromkeys(weights, handle))

    def _flat_gather(self, weights: Sequence[Weight], dtype: DType, label: str) -> Storage:
        """`_all_gather_dtype`: the partitions of all ranks."""
        self._serial += 1
        members = tuple((1, (*self._partition(weight.dims), "dp_shard")) for weight in weights)
        size = FlatSize(members, dtype.bits)
        made = buffer(f"{label}.{self._serial}", size, dtype, Role.GATHER, stream=self._streams[0])
        self.job.allocate("_all_gather_dtype", made)
        return made

    def wait(self, weight: Weight) -> None:
        """`AllGatherCoalescedHandle.wait`: a copy of each weight; the buffer goes with the last that was waited for."""
        handle = self._handles.pop(weight, None)
        if handle is None:
            return
        if not handle.split:
            handle.split = True
            if self.options.zero_quantized_weights:
                handle.flat.append(self._flat_gather(handle.weights, self._dtype, "dequantize"))
            for each in handle.weights:
                self._gathered[each] = self._whole(each, "gathered", padded=False)
                self._gathered[each].stream = self._streams[0]
                self.job.allocate("cat", self._gathered[each])
        if handle not in self._handles.values():
            self.job.free(*handle.flat)

    def release(self, weight: Weight) -> None:
        """`free_param`; with hpZ its secondary partition is made first (`_partition_param_sec`)."""
        if self.options.zero_hpz_partition_size > 1 and weight not in self._kept.secondary:
            self._kept.secondary[weight] = self._secondary[weight]
            self.job.allocate("_partition_param_sec", self._secondary[weight])
        self.job.free(self._gathered.pop(weight))

    def fork(self) -> Self:
        """The coordinator's state, too."""
        other = super().fork()
        other._coordinator = self._coordinator.fork()
        other._walk = Walk()
        other._walk.stack = self._walk.stack.copy()
        handles = {id(handle): attrs.evolve(handle, flat=handle.flat.copy()) for handle in self._handles.values()}
        other._handles = {weight: handles[id(handle)] for weight, handle in self._handles.items()}
        return other

    # modules -------------------------------------------------------------------------------------------------------

    def begin_forward(self, turn: Turn) -> None:
        """`reset_step`: the first micro-batch has no trace of modules yet, and gathers nothing ahead."""
        first = turn.cold and turn.first
        if turn.first:
            self._kept.secondary.clear()
        self._coordinator = Coordinator(self._modules, None if first else self._trace, self._limits)
        if not first:
            for weight, storage in zip(self._persistent(), self._kept_persistent, strict=True):
                self._coordinator.hold(weight)
                self._gathered[weight] = storage
        self._coordinator.fetch((), self)

    def _persistent(self) -> list[Weight]:
        return [weight for weight in self._weights.values() if weight.persists]

    def before_op(self, op: Op) -> None:
        """Pre- and post-forward hooks of every module on the way."""
        self._go(path_of(op))

    def _go(self, path: Sequence[Step]) -> None:
        left, entered = self._walk.go(path)
        for module in left:
            self._coordinator.release(module, self)
        for module in entered:
            self._coordinator.fetch(module, self)

    def end_forward(self) -> None:
        """The model returns."""
        self._go(())

    def begin_backward(self, turn: Turn) -> None:
        """The model's output has its gradient."""
        self._keeps = turn.cold and turn.first and not turn.last
        self._walk = Walk()
        self._coordinator.fetch((), self)

    def before_node(self, op: Op) -> None:
        """Pre- and post-backward hooks of every module on the way."""
        self._go(path_of(op))

    # gradients -----------------------------------------------------------------------------------------------------

    def accumulated(self, parameter: Storage) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`."""
        weight, limit = self._weights[parameter], self.options.reduce_bucket_size
        filled = sum(self._weights[tensor.storage].elements for tensor in self._bucket)
        if self._bucket and filled + weight.elements > limit:
            self._flush()
        gradient = self.job.gradients.pop(parameter)
        if weight.elements <= limit:
            self.job.free(gradient)
        else:
            self._oversized.append(gradient)
        self._bucket.append(next(t for t in self.job.graph.parameters if t.storage is parameter))

    def _flush(self) -> None:
        """`__reduce_and_partition_ipg_grads`; `reduce_scatter_coalesced` copies what it cannot reduce in place."""
        filled = sum(self._weights[tensor.storage].elements for tensor in self._bucket)
        alone = len(self._bucket) == 1 and filled % self.job.plan.mesh.dp_shard == 0
        if not alone and (self.options.reduce_scatter or filled > self.options.reduce_bucket_size):
            members = tuple((1, (*self._partition(tensor.dims), "dp_shard")) for tensor in self._bucket)
            size = FlatSize(members, self._dtype.bits)
            copy = buffer("reduce_scatter_coalesced", size, self._dtype, Role.REDUCE, stream=self._streams[1])
            self.job.allocate("cat", copy)
            self.job.free(copy)
        self.job.free(*self._oversized)
        self._oversized.clear()
        self._bucket.clear()

    def end_backward(self) -> None:
        """`independent_gradient_partition_epilogue`, `release_backward_leftovers`."""
        self._go(())
        if self._bucket:
            self._flush()
        self._coordinator.release_all(self, persistent=self._kept.gathered is False)
        if self._keeps:
            self.job.allocate("all_gather", *self._kept_persistent)
            self._kept.gathered = True

    # optimizer -----------------------------------------------------------------------------------------------------

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """One flat parameter per sub-group."""
        return [
            Parameter(master, gradient, ((dim,),), group=number)
            for number, (master, gradient, dim) in enumerate(
                zip(self._masters, self._gradients, self._dims, strict=True)
            )
        ]

    def before_step(self, step: OptimizerStep) -> None:
        """`step`: every weight is partitioned, persistent ones too; then the norm, of one partition at a time."""
        step.free([*(self._kept_persistent if self._kept.gathered else ()), *self._kept.secondary.values()])
        largest = max(self.job.graph.parameters, key=lambda tensor: self._weights[tensor.storage].elements)
        copy = buffer("norm", size_of(self._partition(largest.dims), FP64.bits), FP64, Role.OPTIMIZER)
        step.allocate("norm", copy)
        step.free([copy])

    def before_group(self, step: OptimizerStep) -> None:
        """`_prepare_fp32_grad_for_sub_group`."""
        (parameter,) = step.parameters
        size = size_of((self._dims[parameter.group],), self._dtype.bits)
        copy = buffer("flat gradient", size, self._dtype, Role.GRADIENT)
        step.allocate("flatten", copy)
        step.allocate("_to_copy", parameter.gradient)
        step.free([copy])

    def after_group(self, step: OptimizerStep) -> None:
        """`_release_sub_group`."""
        step.free([parameter.gradient for parameter in step.parameters])

    def cleared(self, gradients: Sequence[Storage]) -> list[Storage]:
        """Freed already."""
        return []

    def after_step(self, step: OptimizerStep) -> None:
        """`_post_step`: persistent weights are gathered again."""
        for storage in self._kept_persistent:
            step.allocate("all_gather", storage)
        self._kept.gathered = True
