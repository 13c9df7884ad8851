"""ZeRO-3 of DeepSpeed: 16-bit weights, gradients and optimizer state partitioned, weights gathered module by module.

Technique: Rajbhandari et al., arXiv:1910.02054, section 5.3 (P_os+g+p); ZeRO++, Wang et al., arXiv:2306.10209.
Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage3.py and partition_parameters.py (function named per method).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import ClassVar, Self

import attrs

from hardware.dtypes import FP32, DType
from hardware.errors import UnsupportedError
from simulator.graph import COMPUTE, Op, Storage
from simulator.host import HostMemory
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import size_of
from strategies.deepspeed.coordinator import LAYER, Coordinator, Limits, Recording, Route, Step, Walk, Weight, path_of
from strategies.deepspeed.zero3_gather import Gatherer, Gathering
from strategies.deepspeed.zero3_offload import OffloadedPartitions, OffloadingReducer, offloaded
from strategies.deepspeed.zero3_optimizer import Partitions
from strategies.deepspeed.zero3_reduce import Reducer, Reduction
from strategies.deepspeed.zero12 import BUCKET_ELEMENTS, OFFLOAD, check
from strategies.deepspeed.zero12_offload import check_offload
from strategies.options import count, flag, later, option, training_dtype
from strategies.rules import refuse_load_balancing

#: Streams of the coordinator's gathers and of the reduction (stage3.py).
GATHER, REDUCE = "allgather", "reduce_and_partition"


@attrs.frozen(kw_only=True)
class DeepSpeedZero3:
    """`DeepSpeedZeroOptimizer_Stage3`, with the options and defaults of `DeepSpeedZeroConfig`; sizes in elements.

    Every layer is built (`Plan.unrolled`): what the coordinator gathers ahead and releases differs from layer to
    layer. For 80 layers that takes seconds, where strategies with periodic decisions take a tenth of one.

    Not modelled: while a weight's gradient is reduced, that of its module's input waits in `PostBackwardFunctionModule`
    before it is added to the one of a sibling (gate and up, or query, key and value). Where that reduction is the peak
    it is one layer's input too low.
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
    stage3_allgather_sequential: bool = option(False, flag, "weights are gathered one by one, without a flat buffer")
    grad_accum_dtype: DType | None = option(None, training_dtype, "of the partitions; none is the weights' own type")
    zero_hpz_partition_size: int = option(1, count(1), "ranks over which a second copy is sharded for backward (hpZ)")
    zero_quantized_weights: bool = option(False, flag, "weights are gathered in int8 (qwZ)")
    zero_quantized_gradients: bool = option(False, flag, "gradients are reduced in int4 (qgZ)")
    offload_optimizer: str = option("none", later(("none", "cpu"), "nvme"), "where optimizer state is kept", OFFLOAD)
    pin_memory: bool = option(True, flag, "what is offloaded is in page-locked host memory", OFFLOAD)
    offload_param: str = option("none", later("none", "cpu", "nvme"), "where partitions of weights are kept", OFFLOAD)
    axis: ClassVar[str] = "dp_shard"
    name: str = attrs.field(default="deepspeed_zero3", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with everything partitioned."""
        check(plan, self.name)
        refuse_load_balancing(plan, self.name)
        if self.offload_optimizer != "none":
            check_offload(plan, self.name)
            if not self.contiguous_gradients:
                raise UnsupportedError(
                    "'offload_optimizer' without 'contiguous_gradients' is not modelled: leave one out"
                )
        if self.zero_quantized_gradients:
            raise UnsupportedError("'zero_quantized_gradients' is not modelled; leave it out")
        if self.grad_accum_dtype not in (None, FP32, plan.training.weights):
            raise UnsupportedError(
                f"'grad_accum_dtype' {self.grad_accum_dtype} with {plan.training.weights} weights is not modelled; "
                "use fp32 or leave it out"
            )
        if plan.mesh.dp_shard % self.zero_hpz_partition_size:
            raise UnsupportedError(
                f"'zero_hpz_partition_size' must divide the {plan.mesh.dp_shard} ranks: {self.zero_hpz_partition_size}"
            )
        return attrs.evolve(
            plan,
            hooks=(*plan.hooks, self),
            unrolled=True,
            scaled_loss=True,
            memory_efficient_linear=True,
        )

    def gathering(self, stream: str) -> Gathering:
        """What shapes a gather."""
        return Gathering(
            stream, self.stage3_allgather_sequential, self.zero_quantized_weights, self.zero_hpz_partition_size
        )

    def reduction(self, accumulates: DType, stream: str) -> Reduction:
        """What shapes the reduction."""
        return Reduction(self.reduce_bucket_size, self.reduce_scatter, self.contiguous_gradients, accumulates, stream)

    def accumulates(self, plan: Plan) -> DType:
        """Element type of the gradients' partitions."""
        return self.grad_accum_dtype or plan.training.weights

    def host(self, plan: Plan) -> HostMemory:
        """What a rank keeps in host memory."""
        if self.offload_optimizer == "none":
            return HostMemory()
        return offloaded(plan, self.accumulates(plan), pinned=self.pin_memory)

    def start(self, job: Job) -> Zero3Runtime:
        """Partition the weights."""
        return Zero3Runtime(job, self)


class Zero3Runtime(Runtime):
    """`DeepSpeedZeroOptimizer_Stage3`, its coordinator and the hooks of every module."""

    clips = True
    cold_differs = True

    def __init__(self, job: Job, options: DeepSpeedZero3) -> None:
        super().__init__(job)
        self.options = options
        self.first_differs = options.zero_hpz_partition_size > 1
        self._weights = self._find_weights()
        self._persistent = [weight for weight in self._weights.values() if weight.persists]
        self._route = Route(job.graph)
        self._after = self._route.last
        self._modules = self._find_modules()
        self._never_left = self._without_input_gradient()
        self._recording = Recording()
        self._recomputing: Walk | None = None
        self._limits = Limits(
            options.stage3_prefetch_bucket_size, options.stage3_max_live_parameters, options.stage3_max_reuse_distance
        )
        self._coordinator = Coordinator(self._modules, self._recording, self._limits, complete=False)
        self._walk = Walk()
        gather, reduce = (GATHER, REDUCE) if options.overlap_comm else (COMPUTE, COMPUTE)
        self._gatherer = Gatherer(job, options.gathering(gather), self._weights.values())
        self._regathered = [self._gatherer.whole(weight, "persistent", padded=True) for weight in self._persistent]
        if job.plan.mesh.dp_shard == 1:
            self._regathered.clear()
        accumulates = options.accumulates(job.plan)
        offloads = options.offload_optimizer != "none"
        self.last_differs = offloads and job.plan.training.gradient_accumulation > 1
        order = {weight: index for index, weight in enumerate(self._weights.values())}
        reducer = OffloadingReducer if offloads else Reducer
        self._reducer = reducer(job, options.reduction(accumulates, reduce), order)
        partitions = OffloadedPartitions if offloads else Partitions
        self._partitions = partitions(job, list(order), options.sub_group_size, accumulates)
        self._keep()
        self.second_differs = bool(self._regathered)
        self._backward = self._records = self._settles = self._stops = self._stepped = False

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

    def _find_modules(self) -> dict[tuple[Step, ...], tuple[Weight, ...]]:
        """The weights of each module in the order of their ids."""
        owned: dict[tuple[Step, ...], set[Weight]] = {}
        walk = Walk()
        for op in self.job.graph.ops:
            walk.go(path_of(op))
            for tensor in op.inputs:
                if tensor.is_parameter:
                    owned.setdefault(tuple(walk.stack), set()).add(self._weights[tensor.storage])
        ids = {weight: index for index, weight in enumerate(self._weights.values())}
        return {path: tuple(sorted(weights, key=ids.__getitem__)) for path, weights in owned.items()}

    def _without_input_gradient(self) -> set[tuple[Step, ...]]:
        """Modules, such as embeddings, whose inputs need no gradient: no post-backward hook tells their end."""
        walk, found = Walk(), set(self._modules)
        for op in self.job.graph.ops:
            walk.go(path_of(op))
            if any(tensor.requires_grad and not tensor.is_parameter for tensor in op.inputs):
                found.discard(tuple(walk.stack))
        return found

    def _keep(self) -> None:
        """`_setup_for_real_optimizer`: partitions, the bucket in full; hpZ's first secondary partitions."""
        resident = [*self._partitions.resident]
        if self.options.contiguous_gradients:
            dtype = self.job.plan.training.weights
            size = size_of((self.options.reduce_bucket_size,), dtype.bits)
            bucket = buffer("ipg_bucket", size, dtype, Role.BUCKET)
            bucket.persistent = True
            resident.append(bucket)
        self.job.keep_instead([*resident, *self._gatherer.secondaries(self._weights.values())])

    def fork(self) -> Self:
        """The state of everything that has one."""
        other = super().fork()
        other._coordinator = self._coordinator.fork()
        other._gatherer, other._reducer = self._gatherer.fork(), self._reducer.fork()
        other._walk = Walk()
        other._walk.stack = self._walk.stack.copy()
        return other

    # modules -------------------------------------------------------------------------------------------------------

    def begin_forward(self, turn: Turn) -> None:
        """`reset_step`: the first micro-batch has no trace of modules yet, and gathers nothing ahead.

        The second gathers what persists as it meets it, unless the first step has ended; those after it have it.
        """
        first = turn.cold and turn.first
        if turn.first and not turn.cold:
            self._gatherer.seconds.clear()
        if first:
            self._recording.modules.clear()
        self._coordinator = Coordinator(self._modules, self._recording, self._limits, complete=not first)
        if not first:
            later = dict(zip(self._persistent, self._regathered, strict=False))
            for weight, storage in (self._recording.left if turn.cold and turn.second else later).items():
                self._coordinator.hold(weight)
                self._gatherer.hold(weight, storage)
        self._enter_model()

    def _enter_model(self) -> None:
        self.job.recorder.module, self.job.recorder.slot = "", None
        self._coordinator.fetch((), self._gatherer)

    def before_op(self, op: Op) -> None:
        """Pre- and post-forward hooks of every module on the way."""
        for path in self._route.forward(op):
            self._go(self._walk, path)

    def _go(self, walk: Walk, path: Sequence[Step]) -> None:
        left, entered = walk.go(path)
        for module in left:
            if not (self._backward and walk is self._walk and module in self._never_left):
                self._coordinator.release(module, self._gatherer)
        for module in entered:
            self._coordinator.fetch(module, self._gatherer)

    def end_forward(self) -> None:
        """The model returns."""
        self._go(self._walk, ())

    def begin_backward(self, turn: Turn) -> None:
        """The model's output has its gradient."""
        self._after = self._route.last
        self._backward = True
        self._reducer.turn(turn)
        self._records, self._settles = turn.cold and turn.first and not turn.last, turn.cold and turn.second
        self._stops = turn.cold and turn.first and turn.last
        self._walk = Walk()
        self._enter_model()

    def before_node(self, op: Op) -> None:
        """Pre- and post-backward hooks of every module on the way."""
        if self._route.index(op) > self._route.last:  # the engine's multiples of the loss
            return
        for path in self._route.backward(op, self._after):
            self._go(self._walk, path)
        self._after = self._route.index(op)

    def before_recomputed(self, op: Op) -> None:
        """Pre- and post-forward hooks of the modules in the layer; they fetch and release.

        Not the layer's own: what is checkpointed is its ``forward`` (transformers/modeling_layers.py
        `forward_with_checkpointing`).
        """
        if self._recomputing is None:
            layer = [name for name, _ in self._walk.stack].index(LAYER)
            self._recomputing = Walk()
            self._recomputing.stack = self._walk.stack[: layer + 1]
        for path in self._route.recomputed(op):
            self._go(self._recomputing, path)

    def place_of(self, weight: Storage) -> Storage | None:
        """The gathered weight, which outlives its release until the op that saves it has run backward."""
        return self._gatherer.save(self._weights[weight]) if weight in self._weights else None

    def end_recomputation(self) -> None:
        """Recomputation is left by an exception: no post-forward hooks."""
        self._recomputing = None

    def accumulated(self, parameter: Storage) -> None:
        """`reduce_ready_partitions_and_remove_grads`."""
        self._reducer.add(self._weights[parameter], self.job.gradients.pop(parameter))

    def end_backward(self) -> None:
        """`independent_gradient_partition_epilogue`, `release_backward_leftovers`.

        What the second micro-batch has gathered of what persists is from here on one storage for each.
        """
        self._go(self._walk, ())
        self._reducer.flush()
        self._coordinator.release_all(self._gatherer, persistent=self._settles or self._stops)
        if self._records:
            self._recording.left = self._gatherer.holding(self._persistent)
        if self._settles:
            self.job.allocate("all_gather", *self._regathered)

    # optimizer -----------------------------------------------------------------------------------------------------

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """One flat parameter per sub-group."""
        return self._partitions.parameters()

    def before_step(self, step: OptimizerStep) -> None:
        """`step`: every weight is partitioned, persistent ones too; then the norm."""
        if self._stepped or self.job.plan.training.gradient_accumulation > 1:
            self._partition_all(step)
        self._stepped = True
        self._partitions.begin(step)

    def _partition_all(self, step: OptimizerStep) -> None:
        """`_partition_all_parameters`: what persists goes; with hpZ its secondary partitions are made."""
        missing = [weight for weight in self._persistent if weight not in self._gatherer.seconds]
        for storage in self._gatherer.secondaries(missing):
            step.allocate("_partition_param_sec", storage)
        self._gatherer.seconds.update(missing)
        step.free(self._regathered)

    def before_group(self, step: OptimizerStep) -> None:
        """The sub-group's gradients in fp32."""
        self._partitions.prepare(step)

    def after_group(self, step: OptimizerStep) -> None:
        """They go."""
        self._partitions.release(step)

    def cleared(self, gradients: Sequence[Storage]) -> list[Storage]:
        """Freed already."""
        return []

    def after_step(self, step: OptimizerStep) -> None:
        """`_post_step`: what persists is gathered again, secondary partitions are dropped."""
        for storage in self._regathered:
            step.allocate("all_gather", storage)
        step.free(self._gatherer.secondaries(self._weights.values()))
        self._partitions.end(step)
