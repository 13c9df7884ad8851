"""FSDP1: the weights of a unit are one flat parameter, sharded evenly over the ranks (`FullyShardedDataParallel`).

Technique: Zhao et al., PyTorch FSDP, arXiv:2304.11277; ZeRO-2 and 3 of Rajbhandari et al., arXiv:1910.02054.
Behaviour: torch 2.13 torch/distributed/fsdp/_runtime_utils.py (function named per method), _flat_param.py for sizes.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from hardware.dtypes import DType
from hardware.errors import UnsupportedError, UsageError
from simulator.graph import Storage
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Turn, buffer
from simulator.sizes import FlatSize, size_of
from simulator.units import Unit
from strategies.fsdp1_flat import (
    FULL_SHARD,
    HYBRID_SHARD,
    HYBRID_SHARD_ZERO2,
    NO_SHARD,
    POST_BACKWARD,
    RESHARD_AFTER_FORWARD,
    SHARD_GRAD_OP,
    FlatParameters,
)
from strategies.options import choice, flag, later, option, training_dtype
from strategies.rules import refuse_second_owner, refuse_tensor_parallel

#: Optimizers whose step on flat parameters was compared with recordings.
OPTIMIZERS = ("adam", "adamw", "sgd")


@attrs.frozen(kw_only=True)
class Fsdp1:
    """`FullyShardedDataParallel` over mesh axis ``dp_shard``, with its options and defaults and `MixedPrecision`'s.

    ``limit_all_gathers`` is taken and changes nothing: the limiter makes the host wait for events, which changes when
    a block can be used again (active and reserved memory), not the order in which blocks are allocated and freed.
    """

    sharding_strategy: str = option(
        FULL_SHARD,
        choice(FULL_SHARD, SHARD_GRAD_OP, NO_SHARD, HYBRID_SHARD, HYBRID_SHARD_ZERO2),
        "what is sharded, and whether weights are gathered again for backward",
    )
    param_dtype: DType | None = option(None, training_dtype, "element type that weights are gathered and used in")
    reduce_dtype: DType | None = option(None, training_dtype, "element type that gradients are reduced in")
    keep_low_precision_grads: bool = option(
        False, flag, "the optimizer is given gradients in param_dtype (without sharding, in reduce_dtype)"
    )
    backward_prefetch: str = option(
        "pre", choice("pre", "post", "none"), "gather the next unit of backward before or after this one's (or not)"
    )
    forward_prefetch: bool = option(False, flag, "gather the next unit of forward before this one runs")
    limit_all_gathers: bool = option(
        True, flag, "nothing in allocated memory: bounds the gathers in flight whose blocks cannot be used again yet"
    )
    use_orig_params: bool = option(False, flag, "the optimizer sees each weight's part of the shard, not the shard")
    wrap: str = option("layer", choice("root", "layer"), "modules that are wrapped besides the model")
    sync: str = option("every", choice("every", "last"), "micro-batches whose gradients are reduced (`no_sync`)")
    cpu_offload: str = option(
        "none", later("none", "params"), "what is in host memory (CPUOffload; params is offload_params=True)"
    )
    name: str = attrs.field(default="fsdp1", init=False)
    axis: ClassVar[str] = "dp_shard"
    around_liger: ClassVar[bool] = True

    def __call__(self, plan: Plan) -> Plan:
        """The plan with the weights of each unit in one flat parameter."""
        self._check(plan)
        return attrs.evolve(plan, hooks=(*plan.hooks, self), compute=self.param_dtype)

    def _check(self, plan: Plan) -> None:
        mesh, optimizer = plan.mesh, plan.training.optimizer.name
        if optimizer not in OPTIMIZERS:
            raise UnsupportedError(
                f"optimizer {optimizer} on flat parameters is not modelled with {self.name}; "
                f"use one of {', '.join(OPTIMIZERS)}"
            )
        refuse_second_owner(plan, self.name)
        refuse_tensor_parallel(plan, self.name)
        hybrid = self.sharding_strategy in (HYBRID_SHARD, HYBRID_SHARD_ZERO2)
        if self.sharding_strategy != NO_SHARD and hybrid != (mesh.dp_replicate > 1):
            raise UsageError(
                f"'sharding_strategy' must be {HYBRID_SHARD} or {HYBRID_SHARD_ZERO2} where dp_replicate is above 1, "
                f"and only there: {self.sharding_strategy} with dp_replicate {mesh.dp_replicate}; change one of the two"
            )
        self._check_low_precision(plan)
        if not 0 <= plan.rank < mesh.dp:
            raise UsageError(f"'rank' must be from 0 to {mesh.dp - 1}, the data-parallel ranks: {plan.rank}")

    def _check_low_precision(self, plan: Plan) -> None:
        training = plan.training
        if not self.keep_low_precision_grads:
            return
        if training.optimizer.name != "sgd":
            raise UnsupportedError(
                f"'keep_low_precision_grads' must go with sgd: {training.optimizer.name} of torch wants weights and "
                "gradients of one element type; change one of the two"
            )
        if training.zero_grad != "none" or (training.gradient_accumulation > 1 and self.sync == "every"):
            raise UnsupportedError(
                "'keep_low_precision_grads' is not modelled where reduced gradients are added to: "
                "use sync last and zero_grad none"
            )

    def start(self, job: Job) -> Fsdp1Runtime:
        """Flatten and shard the weights."""
        return Fsdp1Runtime(job, self)


class Fsdp1Runtime(FlatParameters):
    """`_FSDPState` of every unit, and `_ExecOrderData`."""

    cold_differs = True  # lazy initialisation, and no forward order yet to prefetch by

    def __init__(self, job: Job, options: Fsdp1) -> None:
        super().__init__(job, options)
        training = job.plan.training
        self._frees = self._sharded and options.sharding_strategy in RESHARD_AFTER_FORWARD
        self._no_sync = options.sync == "last" and training.gradient_accumulation > 1
        self._stays = self._sharded and not self._frees and self._no_sync
        """Whether gathered weights stay from one micro-batch to the next (`_should_free_in_backward`)."""
        self._lingers = options.use_orig_params and training.zero_grad == "none"
        """Whether `zero_grad` frees nothing: the flat gradient stays until the next forward begins."""
        self.first_differs = self._stays or self._lingers
        self.last_differs = self._no_sync
        self._unsharded: dict[Unit, Storage] = {}
        self._ahead = False
        """Whether forward prefetches: the order to do it by is known once a first backward has ended."""
        self._awaited: set[Unit] = set()
        """Handles that `_needs_pre_backward_unshard` is true of."""
        self._order: list[Unit] = []
        """`handles_post_forward_order`."""
        self._turn = Turn(cold=True, first=True, last=True)

    # unsharding ----------------------------------------------------------------------------------------------------

    def _lazy_init(self, unit: Unit) -> None:
        """`init_flat_param_attributes`: buffers are made and their memory given back at once."""
        made = []
        if self._casts:
            made.append(self._low_precision(unit) if self._sharded else self._whole_of[unit])
        if self._sharded:
            made.append(self._whole_of[unit])
        if self._sharded and self._casts:
            size = self._padded_size(unit, self._original)
            made.append(self._buffer(unit, "full_precision", size, self._original, Role.GATHERED))
        for storage in made:
            self.job.allocate("empty", storage)
            self.job.free(storage)

    def _unshard(self, unit: Unit) -> None:
        """`_unshard`, unless it is unsharded or prefetched already; a cast shard lives as long as the call."""
        if unit in self._unsharded or not (self._sharded or self._casts):
            return
        cast = [self._low_precision(unit)] if self._sharded and self._casts else []
        for storage in (*cast, self._whole_of[unit]):
            self.job.allocate("_alloc_storage", storage)
        self.job.free(*cast)
        self._unsharded[unit] = self._whole_of[unit]

    def _reshard(self, unit: Unit, *, free: bool) -> None:
        """`_reshard`; `post_reshard` frees what an unsharded handle casts in any case."""
        if (free or not self._sharded) and unit in self._unsharded:
            self.job.free(self._unsharded.pop(unit))

    def _next(self, unit: Unit) -> Unit | None:
        """`get_handle_to_forward_prefetch`."""
        index = self.handles.index(unit) + 1
        return self.handles[index] if index < len(self.handles) else None

    def _before(self, unit: Unit) -> Unit | None:
        """`get_handle_to_backward_prefetch`, unless its weights were asked for already."""
        index = self._order.index(unit)
        target = self._order[index - 1] if index else None
        return target if target in self._awaited else None

    def _prefetch(self, target: Unit | None) -> None:
        """`_prefetch_handle`."""
        if target is not None:
            self._unshard(target)

    # hooks ---------------------------------------------------------------------------------------------------------

    def begin_forward(self, turn: Turn) -> None:
        """`_root_pre_forward`."""
        self._turn = turn
        self._ahead = self.options.forward_prefetch and not (turn.cold and turn.first)
        self._order = []
        self._unsharded = dict(self._whole_of) if self._stays and not turn.first else {}
        if turn.first and not turn.cold and self._lingers:
            self.job.free(*self._gradient_of.values())
        if turn.first and turn.cold:
            for unit in self.handles:
                self._at(unit, self._lazy_init)
        super().begin_forward(turn)

    def pre_forward(self, unit: Unit) -> None:
        """`_pre_forward_unshard`."""
        if unit in self.handles:
            self._unshard(unit)
            if self._ahead:
                self._prefetch(self._next(unit))

    def post_forward(self, unit: Unit) -> None:
        """`_post_forward`: the root's weights stay for backward."""
        if unit in self.handles:
            self._order.append(unit)
            self._awaited.add(unit)
            self._reshard(unit, free=self._frees and not unit.is_root)

    def begin_backward(self, turn: Turn) -> None:
        """``backward()`` is called."""
        super().begin_backward(turn)
        self._turn = turn

    def pre_backward(self, unit: Unit) -> None:
        """`_pre_backward_hook`."""
        if unit not in self.handles:
            return
        self._unshard(unit)
        self._awaited.discard(unit)
        if self.options.backward_prefetch == "pre":
            self._prefetch(self._before(unit))

    def end_backward(self) -> None:
        """The root's views were made before everything else, so that their backward is the last to run."""
        if self._current is not None:
            self._leave(self.post_backward)
        if self._root in self.handles:
            self._at(self._root, self.post_backward)
            self._at(self._root, self._post_backward)
        if self._sharded and self._final != self._original and (self._turn.last or not self._no_sync):
            for unit in self.handles:
                self._at(unit, self._lower_gradient)

    def _lower_gradient(self, unit: Unit) -> None:
        """`_finalize_params`, `prepare_gradient_for_optim`: casts for the optimizer."""
        self.job.allocate("_to_copy", self._gradient_of[unit])
        self.job.free(self._reduced_gradient(unit))

    def _reduced_gradient(self, unit: Unit) -> Storage:
        """`_saved_grad_shard`."""
        if self._final == self._original:
            return self._gradient_of[unit]
        size = self._sharded_size(unit, self._original)
        return self._buffer(unit, "saved_grad_shard", size, self._original, Role.GRADIENT, self._reduction_stream)

    def post_backward(self, unit: Unit) -> None:
        """The flat gradient is made when backward has passed the point where forward made the views.

        Prefetching in forward makes them as the unit before is entered (`_use_unsharded_flat_param`), so that
        the unit's gradients live as long as that one's.
        """
        target = self._next(unit) if self._ahead else unit
        if target is not None and not target.is_root:
            self._post_backward(target)

    def _post_backward(self, unit: Unit) -> None:
        """`_post_backward_hook` of the flat parameter's `AccumulateGrad`."""
        fresh = self._split_backward(unit)
        gradient = self._standing(unit) or fresh
        reduces = self._turn.last or not self._no_sync
        self._reshard(unit, free=self._sharded and (reduces or self._frees))
        if self.options.backward_prefetch == "post":
            self._prefetch(self._before(unit))
        if reduces and self._sharded:
            self._reduce_scatter(unit, gradient)
        elif reduces:
            self._all_reduce(unit, gradient)
        if gradient is not fresh:  # autograd holds on to what it added in place until hooks have run
            self.job.free(fresh)

    # gradients -----------------------------------------------------------------------------------------------------

    def _split_backward(self, unit: Unit) -> Storage:
        """Autograd's `split_with_sizes_backward`: all gradients of the unit, and zeros for padding, concatenated."""
        own = [self.job.gradients.pop(t.storage) for t in unit.parameters]
        padding = []
        for number, gap in enumerate(self._layout(unit)[1]):
            size = size_of((gap,), self._compute.bits)
            padding.append(buffer(f"{unit.name}.padding.{number}", size, self._compute, Role.BACKWARD, unit.slot))
            self.job.allocate("zeros", padding[-1])
        whole = self._flat_gradient(unit)
        self.job.allocate("cat", whole)
        self.job.free(*padding, *own)
        return whole

    def _flat_gradient(self, unit: Unit) -> Storage:
        """What autograd makes: the final gradient itself, where that needs no reduction to a shard and no cast."""
        if self._standing(unit) is not None:
            label = "unsharded_gradient.more"
        elif not self._sharded and self._compute == self._reduce == self._final:
            return self._gradient_of[unit]
        else:
            label = "unsharded_gradient"
        return self._buffer(unit, label, self._unpadded_size(unit, self._compute), self._compute, Role.GRADIENT)

    def _standing(self, unit: Unit) -> Storage | None:
        """The unsharded gradient that autograd adds to, if one is left from earlier micro-batches or steps."""
        if not self._sharded and self._has_gradient:
            return self._gradient_of[unit]
        if self._turn.first or not self._no_sync:
            return None
        if not self._sharded and self._compute == self._reduce == self._final:
            return self._gradient_of[unit]
        size = self._unpadded_size(unit, self._compute)
        return self._buffer(unit, "unsharded_gradient", size, self._compute, Role.GRADIENT)

    @property
    def _has_gradient(self) -> bool:
        """Whether reduced gradients are there when this backward begins."""
        zeroed = not self._turn.cold and self.job.plan.training.zero_grad == "zero"
        return zeroed or not (self._turn.first or self._no_sync)

    def _reduce_scatter(self, unit: Unit, gradient: Storage) -> None:
        """`_reduce_grad`: whatever it makes on the way lives until the hook returns."""
        made = [gradient]
        if self._compute != self._reduce:
            size = self._unpadded_size(unit, self._reduce)
            made.append(self._reduction(unit, "cast_gradient", size, "_to_copy"))
        if self._needs_padding(unit):
            size = self._padded_size(unit, self._reduce)
            made.append(self._reduction(unit, "padded_gradient", size, "constant_pad_nd"))
        shard = self._sharded_gradient(unit)
        self._use_grad_views(unit)
        self.job.free(*made, *([shard] if self._has_gradient else []))

    def _reduction(self, unit: Unit, label: str, size: FlatSize, op: str) -> Storage:
        made = self._buffer(unit, label, size, self._reduce, Role.REDUCE, POST_BACKWARD)
        self.job.allocate(op, made)
        return made

    def _needs_padding(self, unit: Unit) -> bool:
        """`_get_reduce_scatter_tensors`."""
        bindings = self.job.plan.dimensions.bindings
        sizes = [size(unit, self._reduce).elements(bindings) for size in (self._unpadded_size, self._padded_size)]
        return bool(sizes[0] != sizes[1])

    def _sharded_gradient(self, unit: Unit) -> Storage:
        """The reduce-scatter's output in the original dtype (`_accumulate_sharded_grad`)."""
        result = self._reduced_gradient(unit)
        if self._has_gradient:
            result = attrs.evolve(result, label=f"{result.label}.more")
        if self._reduce == self._original:
            self.job.allocate("empty_like", result)
            return result
        output = self._reduction(unit, "reduced_gradient", self._sharded_size(unit, self._reduce), "empty_like")
        self.job.allocate("_to_copy", result)
        self.job.free(output)
        return result

    def _all_reduce(self, unit: Unit, gradient: Storage) -> None:
        """`_reduce_grad_no_shard`, in place but for casts; of two alike the older gradient stays in the books."""
        reduced, final = gradient, self._gradient_of[unit]
        if gradient.dtype != self._reduce:
            size = self._unpadded_size(unit, self._reduce)
            cast = self._reduce != self._final or gradient is final
            reduced = self._reduction(unit, "cast_gradient", size, "_to_copy") if cast else final
            if not cast:
                self.job.allocate("_to_copy", final)
        if reduced.dtype != self._final:
            result = attrs.evolve(final, label=f"{final.label}.more") if gradient is final else final
            self.job.allocate("_to_copy", result)
            self.job.free(reduced, *([result] if gradient is final else []))
        self._use_grad_views(unit)
        if gradient is not final and reduced is not gradient:
            self.job.free(gradient)

    def _use_grad_views(self, unit: Unit) -> None:
        """`_use_sharded_grad_views`: a low-precision gradient takes a detour over an empty one, where there is none."""
        if self._keeps_low and (self._turn.first or not self._no_sync):
            for parameter in self._pieces_of.get(unit, ()):
                made = attrs.evolve(parameter.storage, label=f"{parameter.storage.label}.empty", persistent=False)
                self.job.allocate("empty_like", made)
                self.job.free(made)
