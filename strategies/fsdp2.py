"""FSDP2 and HSDP: every weight sharded along its first dimension, gathered unit by unit (`fully_shard`).

Technique: Zhao et al., PyTorch FSDP, arXiv:2304.11277; ZeRO-3 of Rajbhandari et al., arXiv:1910.02054, section 5.
Behaviour: torch 2.13 torch/distributed/fsdp/_fully_shard/ (file named per method).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import attrs

from hardware.dtypes import DType
from hardware.errors import UnsupportedError, UsageError
from simulator.graph import COMPUTE, Storage, Tensor, flat
from simulator.host import HostMemory, offloaded_training
from simulator.optimizers.step import Parameter
from simulator.plan import FULLY_SHARDED, Plan
from simulator.roles import Role
from simulator.runtime import Job, Turn, buffer
from simulator.sizes import Dim, FlatSize, size_of, with_bits
from simulator.units import WRAPS, Unit, UnitRuntime, wrapped_units
from simulator.workload import MEGATRON
from strategies.options import choice, count, flag, option, training_dtype
from strategies.rules import refuse_second_owner

#: Streams of `FSDPCommContext` (_fsdp_param_group.py).
COPY_IN, REDUCE_SCATTER, ALL_REDUCE = "all_gather_copy_in", "reduce_scatter", "all_reduce"
#: Optimizers whose sharded step was compared with recordings.
OPTIMIZERS = ("adam", "adamw", "sgd")


def _reshard(_: object, attribute: attrs.Attribute[bool | int], value: object) -> None:
    if not isinstance(value, int) or value < 0:
        raise UsageError(f"{attribute.name!r} must be true, false or a number of ranks: {value!r}")


@attrs.frozen(kw_only=True)
class Fsdp2:
    """`fully_shard` over mesh axes ``dp_shard`` and ``cp`` as one; with ``dp_replicate`` above 1, HSDP.

    The options are those of `fully_shard`, `MixedPrecisionPolicy` and `FSDPModule`, with torch's defaults.
    """

    reshard_after_forward: bool | int = option(
        True, _reshard, "free gathered weights after forward; a number keeps shards over so many ranks"
    )
    root_reshard_after_forward: bool = option(False, flag, "free the root's too (torch keeps them for backward)")
    param_dtype: DType | None = option(None, training_dtype, "element type that weights are gathered and used in")
    reduce_dtype: DType | None = option(None, training_dtype, "element type that gradients are reduced in")
    wrap: str = option("layer", choice(*WRAPS), "modules that are wrapped besides the model")
    prefetch: int = option(0, count(0), "units gathered ahead explicitly (set_modules_to_forward/backward_prefetch)")
    sync: str = option(
        "every", choice("every", "last"), "micro-batches whose gradients are reduced (set_requires_gradient_sync)"
    )
    offload: bool = option(False, flag, "weights, gradients and optimizer state in host memory (CPUOffloadPolicy)")
    pin_memory: bool = option(True, flag, "offloaded weights and gradients are pinned (CPUOffloadPolicy)")
    name: str = attrs.field(default="fsdp2", init=False)
    axis: ClassVar[str] = "dp_shard"
    around_liger: ClassVar[bool] = True
    in_stages: ClassVar[bool] = True
    in_split_backward: ClassVar[bool] = True

    def __call__(self, plan: Plan) -> Plan:
        """The plan with every weight sharded."""
        self._check(plan)
        return attrs.evolve(
            plan,
            hooks=(*plan.hooks, self),
            compute=self.param_dtype,
            cast_inputs=self.param_dtype is not None,
            reach=max(plan.reach, self.prefetch),
        )

    def _check(self, plan: Plan) -> None:
        training, shards = plan.training, plan.mesh.dp_shard_cp
        if plan.training.implementation in MEGATRON:
            raise UnsupportedError(f"{self.name} around Megatron-LM's own code is not modelled: leave it out")
        if training.optimizer.name not in OPTIMIZERS:
            raise UnsupportedError(
                f"optimizer {training.optimizer.name} on sharded weights is not modelled with {self.name}; "
                f"use one of {', '.join(OPTIMIZERS)}"
            )
        refuse_second_owner(plan, self.name)
        self._check_stages(plan)
        ranks = self.reshard_after_forward
        if ranks is not True and ranks is not False and (ranks < 2 or shards % ranks or ranks == shards):
            fitting = [n for n in range(2, shards) if shards % n == 0]
            raise UsageError(
                f"'reshard_after_forward' must be true, false or a proper divisor of the {shards} shards: {ranks}; "
                f"{'use one of ' + ', '.join(map(str, fitting)) if fitting else 'use true'}"
            )

    def _check_stages(self, plan: Plan) -> None:
        """In a pipeline as torchtitan's `apply_fsdp` has it; when gradients are reduced, its schedule says."""
        if plan.pipeline is None:
            return
        asked = {
            "reshard_after_forward": (self.reshard_after_forward, False),
            "root_reshard_after_forward": (self.root_reshard_after_forward, False),
            "sync": (self.sync, "last"),
            "prefetch": (self.prefetch, 0),
            "offload": (self.offload, False),
        }
        for name, (given, modelled) in asked.items():
            if given != modelled:
                way = f"use {str(modelled).lower()}"
                raise UnsupportedError(f"{name!r} {str(given).lower()} of fsdp2 in a pipeline is not modelled: {way}")

    def start(self, job: Job) -> Fsdp2Runtime:
        """Shard the weights."""
        return Fsdp2Runtime(job, self)

    def host(self, plan: Plan) -> HostMemory:
        """Offloaded shards; gradients are copied to pinned memory, too (`foreach_reduce`: without blocking)."""
        return self.start(Job(plan)).offloaded() if self.offload else HostMemory()


@attrs.define(eq=False)
class _Kept:
    """Gradients that outlive a micro-batch."""

    sharded: dict[Unit, Storage] = attrs.field(factory=dict)
    accumulated: dict[Storage, Storage] = attrs.field(factory=dict)
    """Unsharded, in the reduce dtype: weights of the graph to gradients (``set_requires_gradient_sync(False)``)."""


class Fsdp2Runtime(UnitRuntime):
    """`FSDPState` and `FSDPParamGroup` of every unit, and their `FSDPCommContext`.

    In a stage of a pipeline weights stay gathered, and gradients are put by, until all micro-batches went backward
    (torch/distributed/pipelining/stage.py `backward_maybe_with_nosync`, `perform_reduce_grad`).
    """

    shards_stages = True

    def __init__(self, job: Job, options: Fsdp2) -> None:
        super().__init__(job, wrapped_units(job.graph, options.wrap))
        self.options = options
        plan = job.plan
        self._staged = plan.pipeline is not None
        self.last_differs = options.sync == "last" and plan.training.gradient_accumulation > 1 and not self._staged
        self._original = plan.training.weights
        self._compute = plan.compute or self._original
        self._reduce = options.reduce_dtype or self._compute
        self._casts = self._compute != self._original
        self._shards = plan.mesh.dp_shard_cp
        self._replicas = plan.mesh.dp_replicate
        self._gather_stream = COPY_IN
        self._kept = _Kept()
        self._shard_of = {t.storage: self._shard(t) for unit in self.units for t in unit.parameters}
        job.keep_instead([] if options.offload else list(self._shard_of.values()))
        self._reduces = True
        self._unsharded: dict[Unit, list[Storage]] = {}
        self._gathered: dict[Unit, Storage] = {}
        """All-gather outputs not copied out yet (`_all_gather_result`)."""
        self._clones: dict[Unit, list[Storage]] = {}
        """Shards over fewer ranks, kept from forward to backward."""
        self._stale: Storage | None = None
        """The last all-gather output of forward (`all_gather_state`)."""
        self._order: list[Unit] = []
        self._reduce_inputs: list[Storage] = []
        self._all_reduced: list[Storage] = []

    # sizes ---------------------------------------------------------------------------------------------------------

    def _shard_dims(self, tensor: Tensor) -> tuple[Dim, ...]:
        """Dim 0 split over the shards, rounded up (_fsdp_param.py `_init_sharded_param`)."""
        first, *rest = tensor.shape or ((),)
        return (self.job.plan.dimensions.split(first, FULLY_SHARDED), *flat(tuple(rest)))

    def _shard(self, tensor: Tensor) -> Storage:
        storage = tensor.storage
        size = size_of(self._shard_dims(tensor), self._original.bits)
        return Storage(storage.label, size, self._original, Role.PARAMETER, storage.slot, persistent=True)

    def _flat(self, unit: Unit, label: str, dtype: DType, role: Role, stream: str, *, whole: bool) -> Storage:
        """A flat buffer over the unit's shards, or over the shards of all ranks."""
        ranks: tuple[Dim, ...] = (FULLY_SHARDED,) if whole else ()
        repeats = [self.job.repeats(t.storage.slot) if unit.slot is None else 1 for t in unit.parameters]
        members = tuple((n, (*self._shard_dims(t), *ranks)) for n, t in zip(repeats, unit.parameters, strict=True))
        return buffer(f"{unit.name}.{label}", FlatSize(members, dtype.bits), dtype, role, unit.slot, stream)

    # gathering -----------------------------------------------------------------------------------------------------

    def _unshard(self, unit: Unit) -> None:
        """`unshard`: the all-gather, unless it is pending or done already."""
        if unit in self._gathered or unit in self._unsharded or not unit.parameters or self._shards == 1:
            return
        copies = self._copy_in(unit)
        output = self._flat(unit, "all_gather_output", self._compute, Role.GATHER, self._gather_stream, whole=True)
        self.job.allocate("all_gather_copy_in", output)
        self.job.free(*copies)
        self._gathered[unit] = output

    def _copy_in(self, unit: Unit) -> list[Storage]:
        """_fsdp_collectives.py `_get_param_all_gather_inputs`: a flat cast, or copies of offloaded shards."""
        if self.options.offload:
            return self._copies_from_host(unit)
        if not self._casts:
            return []
        if unit in self._clones:
            size = FlatSize(self._members(self._clones[unit]), self._compute.bits)
            cast = buffer(f"{unit.name}.cast", size, self._compute, Role.GATHER, unit.slot, COPY_IN)
        else:
            cast = self._flat(unit, "cast", self._compute, Role.GATHER, COPY_IN, whole=False)
        self.job.allocate("foreach_copy", cast)
        return [cast]

    @staticmethod
    def _members(storages: Sequence[Storage]) -> tuple[tuple[int, tuple[Dim, ...]], ...]:
        return tuple(member for s in storages if isinstance(s.size, FlatSize) for member in s.size.members)

    def _copies_from_host(self, unit: Unit) -> list[Storage]:
        """_fsdp_param.py `all_gather_inputs`: each shard to the device, then to the compute dtype."""
        copies = []
        for tensor in unit.parameters:
            dims = self._shard_dims(tensor)
            for dtype in dict.fromkeys((self._original, self._compute)):
                label = f"{tensor.storage.label}.from_host.{dtype}"
                size, slot = size_of(dims, dtype.bits), tensor.storage.slot
                copies.append(buffer(label, size, dtype, Role.GATHER, slot, COPY_IN))
                self._allocate_one(unit, "_to_copy", copies[-1])
            if self._casts:
                self.job.free(copies.pop(-2))
        return copies

    def _wait_for_unshard(self, unit: Unit, *, forward: bool) -> None:
        """`wait_for_unshard`: copy out; forward keeps the all-gather output until the next unit's wait returns.

        Until it returns, and not only until the copy-out: its local `prev_all_gather_state` still refers to it.
        """
        if unit in self._unsharded or not unit.parameters:
            return
        self._unsharded[unit] = self._copy_out(unit)
        self.job.free(*self._clones.pop(unit, ()))
        output = self._gathered.pop(unit, None)
        if forward:
            self._free_stale()
            self._stale = output
        elif output is not None:
            self.job.free(output)

    def _free_stale(self) -> None:
        if self._stale is not None:
            self.job.free(self._stale)
            self._stale = None

    def _copy_out(self, unit: Unit) -> list[Storage]:
        """`alloc_all_gather_outputs`: each weight in a storage of its own."""
        made = []
        for tensor in unit.parameters:
            dims = (*self._shard_dims(tensor), FULLY_SHARDED)
            label = f"{tensor.storage.label}.unsharded"
            made.append(
                buffer(label, size_of(dims, self._compute.bits), self._compute, Role.GATHERED, tensor.storage.slot)
            )
            self._allocate_one(unit, "alloc_all_gather_outputs", made[-1])
        return made

    def _allocate_one(self, unit: Unit, name: str, storage: Storage) -> None:
        """A storage of one weight; the root may hold weights of layers, and then the step is that layer's."""
        recorder = self.job.recorder
        outer = recorder.slot
        recorder.slot = storage.slot if unit.is_root else outer
        self.job.allocate(name, storage)
        recorder.slot = outer

    def _reshard(self, unit: Unit) -> None:
        """`to_sharded`."""
        self.job.free(*self._unsharded.pop(unit, ()))

    def _reshard_partly(self, unit: Unit, ranks: int) -> None:
        """`to_sharded_post_forward`: clone this rank's part of each weight, then free the weight."""
        clones = []
        for tensor, whole in zip(unit.parameters, self._unsharded.pop(unit), strict=True):
            size = FlatSize(((1, (*self._shard_dims(tensor), FULLY_SHARDED)),), self._compute.bits, shards=(ranks,))
            label = f"{tensor.storage.label}.post_forward_shard"
            clones.append(buffer(label, size, self._compute, Role.POST_FORWARD_SHARD, tensor.storage.slot))
            self.job.allocate("clone", clones[-1])
            self.job.free(whole)
        self._clones[unit] = clones

    # hooks ---------------------------------------------------------------------------------------------------------

    def pre_forward(self, unit: Unit) -> None:
        """_fsdp_state.py `_pre_forward`."""
        self._unshard(unit)
        self._wait_for_unshard(unit, forward=True)
        for target in self._ahead(unit, 1):
            self._unshard(target)

    def post_forward(self, unit: Unit) -> None:
        """`post_forward`; the root's also lets go of the last all-gather output."""
        kept = unit.is_root and not self.options.root_reshard_after_forward
        ranks = self.options.reshard_after_forward
        if unit in self._unsharded and not kept and not (unit.name == "head" or ranks is False):
            if ranks is True or unit.is_root:
                self._reshard(unit)
            else:
                self._reshard_partly(unit, ranks)
        if unit.parameters:
            self._order.append(unit)
        if unit.is_root:
            self._free_stale()

    def begin_backward(self, turn: Turn) -> None:
        """Whether gradients are reduced in this micro-batch (`set_requires_gradient_sync`)."""
        super().begin_backward(turn)
        self._reduces = not self._staged and (turn.last or not self.last_differs)

    def pre_backward(self, unit: Unit) -> None:
        """`_pre_backward`: unshard, then prefetch what backward needs next."""
        self._unshard(unit)
        self._wait_for_unshard(unit, forward=False)
        ahead = self._ahead(unit, -1)
        if not ahead and unit in self._order:
            index = self._order.index(unit)
            ahead = self._order[index - 1 : index] if index else []
        for target in ahead:
            self._unshard(target)

    def _ahead(self, unit: Unit, step: int) -> list[Unit]:
        """The layers that explicit prefetching gathers from `unit` on, nearest first."""
        if unit.slot is None or not self.options.prefetch:
            return []
        slots = range(unit.slot + step, unit.slot + step * (self.options.prefetch + 1), step)
        return [self._by_slot[slot] for slot in slots if slot in self._by_slot]

    def post_backward(self, unit: Unit) -> None:
        """`post_backward`: reshard and reduce the gradients, or put them by."""
        weights = [tensor.storage for tensor in unit.parameters]
        made = self._with_gradient()
        gradients = [self._placed(weight, self._collect(unit, weight)) for weight in weights if weight in made]
        if self._reduces or not self._staged:
            self._reshard(unit)
        if not self._reduces:
            return
        self.job.free(*self._reduce_inputs)
        self._reduce_inputs.clear()
        if gradients:
            self._reduce_scatter(unit, gradients)

    def _with_gradient(self) -> set[Storage]:
        return {*self.job.gradients, *self._kept.accumulated}

    def _collect(self, unit: Unit, weight: Storage) -> Storage:
        """The gradient of `weight` to reduce; without reduction, put by in the reduce dtype."""
        gradients, accumulated = self.job.gradients, self._kept.accumulated
        if weight in accumulated:
            if weight in gradients:
                self.job.free(gradients.pop(weight))
            return accumulated.pop(weight) if self._reduces else accumulated[weight]
        if self._reduces:
            return gradients.pop(weight)
        if self._reduce == self._compute:
            return gradients[weight]
        size = with_bits(gradients[weight].size, self._reduce.bits)
        label = f"{weight.label}.accumulated"
        accumulated[weight] = buffer(label, size, self._reduce, Role.GRADIENT, weight.slot)
        self._allocate_one(unit, "to_accumulated_grad", accumulated[weight])
        self.job.free(gradients.pop(weight))
        return accumulated[weight]

    def _placed(self, weight: Storage, gradient: Storage) -> Storage:
        """_fsdp_param.py `_get_grad_inner_tensor`: a gradient of tensor parallelism in the weight's own placement."""
        kernel = self.job.graph.placements.get(weight)
        if kernel is None or not self._reduces:
            return gradient
        size = with_bits(weight.size, gradient.dtype.bits)
        placed = buffer(f"{weight.label}.redistributed", size, gradient.dtype, Role.GRADIENT, weight.slot)
        self.job.allocate(kernel, placed)
        self.job.free(gradient)
        return placed

    def _reduce_scatter(self, unit: Unit, gradients: list[Storage]) -> None:
        """_fsdp_collectives.py `foreach_reduce`; its loop variable keeps the last gradient until it returns."""
        whole = self._flat(unit, "reduce_scatter_input", self._reduce, Role.REDUCE, "compute", whole=True)
        self.job.allocate("reduce_scatter_copy_in", whole)
        leaked = gradients[-1:] if self._shards > 1 else []
        self.job.free(*(gradients[:-1] if leaked else gradients))
        self._keep(unit, self._reduced(unit))
        self.job.free(*leaked)
        self._reduce_inputs.append(whole)

    def _reduced(self, unit: Unit) -> Storage:
        """The shard's gradient in the original dtype; HSDP holds on to what it all-reduced in another."""
        label = "gradient.more" if unit in self._kept.sharded else "gradient"
        cast = self._reduce != self._original
        name = f"{label}.reduced" if cast else label
        output = self._flat(unit, name, self._reduce, Role.GRADIENT, REDUCE_SCATTER, whole=False)
        self.job.allocate("reduce_scatter", output)
        if not cast:
            return output
        stream = ALL_REDUCE if self._replicas > 1 else REDUCE_SCATTER
        result = self._flat(unit, label, self._original, Role.GRADIENT, stream, whole=False)
        self.job.allocate("_to_copy", result)
        if self._replicas > 1:
            self._all_reduced.append(output)
        else:
            self.job.free(output)
        return result

    def _keep(self, unit: Unit, gradient: Storage) -> None:
        """The first gradient stays, later ones are added to it; an offloaded one is copied to the host."""
        if unit in self._kept.sharded or self.options.offload:
            self.job.free(gradient)
        else:
            self._kept.sharded[unit] = gradient

    def put_by(self) -> dict[Storage, Storage]:
        """Those in the reduce dtype (`unsharded_accumulated_grad`)."""
        return self._kept.accumulated

    def unshard_stage(self) -> None:
        """`unshard` of every unit with ``async_op``, and `_assert_unsharded`, which waits for all of them."""
        self._gather_stream = COMPUTE
        for unit in self.units:
            self._at(unit, self._unshard)
        for unit in self.units:
            self._at(unit, lambda unit: self._wait_for_unshard(unit, forward=False))
        self._gather_stream = COPY_IN

    def reshard_stage(self) -> None:
        """`reshard` of every unit."""
        for unit in self.units:
            self._at(unit, self._reshard_alone)

    def _reshard_alone(self, unit: Unit) -> None:
        self.job.recorder.note("to_sharded")
        self._reshard(unit)

    def end_stage(self) -> None:
        """`perform_reduce_grad`: every unit's gradients are reduced, in the order of ``modules()``."""
        self._reduces = True
        for unit in self.units:
            self._at(unit, self.post_backward)
        self.job.recorder.module, self.job.recorder.slot = "root", None
        self.job.recorder.note("finalize_backward")
        self._finish()

    def end_backward(self) -> None:
        """`_root_post_backward_final_callback`."""
        super().end_backward()
        self._finish()

    def _finish(self) -> None:
        recorder = self.job.recorder
        recorder.module, recorder.slot = "root", None
        self.job.free(*self._all_reduced, *self._gathered.values(), *self._reduce_inputs)
        for held in (self._all_reduced, self._gathered, self._reduce_inputs):
            held.clear()

    # optimizer -----------------------------------------------------------------------------------------------------

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Each shard, with its view of the unit's flat gradient; none on the device when offloaded."""
        if self.options.offload:
            return []
        units = {tensor.storage: unit for unit in self.units for tensor in unit.parameters}
        shards = [each for each in parameters if each.storage not in units]  # those of other stages
        for tensor in self.job.graph.parameters:
            shape = ((self._shard_dims(tensor)[0],), *tensor.shape[1:])
            gradient = self._kept.sharded[units[tensor.storage]]
            shards.append(Parameter(self._shard_of[tensor.storage], gradient, shape))
        return shards

    def offloaded(self) -> HostMemory:
        """What of the rank is in host memory: the shard of each weight, and where it is trained its gradient."""
        trained = []
        for tensor in self.job.graph.parameters:
            if tensor.requires_grad:
                shard, shape = self._shard_of[tensor.storage], ((self._shard_dims(tensor)[0],), *tensor.shape[1:])
                gradient = buffer(f"{shard.label}.gradient", shard.size, shard.dtype, Role.GRADIENT, shard.slot)
                trained.append(Parameter(shard, gradient, shape))
        weights = list(self._shard_of.values())
        return offloaded_training(self.job.plan, weights, trained, pinned=self.options.pin_memory)
