"""What the handles of FSDP1 hold: flat parameters, their shards and gradients, and what the optimizer is given of them.

Behaviour: torch 2.13 torch/distributed/fsdp/_flat_param.py (function named per method).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hardware.dtypes import DType
from simulator.graph import COMPUTE, Storage, Tensor
from simulator.optimizers.step import Parameter
from simulator.roles import Role
from simulator.runtime import Job, buffer
from simulator.sizes import Dim, FlatSize, size_of
from simulator.units import Unit, UnitRuntime, wrapped_units
from strategies.flat import Member, lay_out, rank_pieces

if TYPE_CHECKING:
    from strategies.fsdp1 import Fsdp1

#: Streams of `_init_streams`.
PRE_UNSHARD, UNSHARD, POST_BACKWARD, ALL_REDUCE = "pre_unshard", "unshard", "post_backward", "all_reduce"
#: Members of `ShardingStrategy` (torch/distributed/fsdp/api.py), in lower case.
FULL_SHARD, SHARD_GRAD_OP, NO_SHARD = "full_shard", "shard_grad_op", "no_shard"
HYBRID_SHARD, HYBRID_SHARD_ZERO2 = "hybrid_shard", "_hybrid_shard_zero2"
#: `RESHARD_AFTER_FORWARD_HANDLE_STRATEGIES` of _flat_param.py.
RESHARD_AFTER_FORWARD = (FULL_SHARD, HYBRID_SHARD)
#: With ``use_orig_params``, weights start at multiples of so many bits (_flat_param.py `_get_aligned_numel`: 16 B).
ALIGNMENT_BITS = 128


class FlatParameters(UnitRuntime):
    """`FlatParamHandle` of every unit: sizes, storages that last, and the optimizer's view of them."""

    weights_are_views = True

    def __init__(self, job: Job, options: Fsdp1) -> None:
        super().__init__(job, wrapped_units(job.graph, options.wrap))
        self.options = options
        plan = job.plan
        self._original = plan.training.weights
        self._compute = plan.compute or self._original
        self._reduce = options.reduce_dtype or self._compute
        self._casts = self._compute != self._original
        self._keeps_low = options.keep_low_precision_grads
        # one rank is not sharded, whatever is asked (_init_utils.py `_init_core_state`)
        self._sharded = options.sharding_strategy != NO_SHARD and plan.mesh.dp_shard > 1
        self._final = self._gradient_dtype()
        self.handles = tuple(unit for unit in self.units if unit.parameters)
        self._shard_of = {unit: self._shard(unit) for unit in self.handles}
        self._whole_of = {unit: self._whole(unit) for unit in self.handles}
        self._gradient_of = {unit: self._gradient(unit) for unit in self.handles}
        self._pieces_of: dict[Unit, list[Parameter]] = {}
        self._trained = self._parameters()
        job.resident = list(self._shard_of.values())

    # sizes ---------------------------------------------------------------------------------------------------------

    @property
    def _group(self) -> tuple[Dim, ...]:
        """The axes whose degrees multiply to the handle's `world_size`."""
        return ("dp_shard",) if self._sharded else ("dp_replicate", "dp_shard")

    @property
    def _alignment(self) -> int:
        return ALIGNMENT_BITS // self._compute.bits if self.options.use_orig_params else 1

    def _size(self, unit: Unit, dtype: DType, multiple: tuple[Dim, ...], shards: tuple[Dim, ...] = ()) -> FlatSize:
        repeats = [self.job.repeats(t.storage.slot) if unit.slot is None else 1 for t in unit.parameters]
        members = tuple((n, t.dims) for n, t in zip(repeats, unit.parameters, strict=True))
        return FlatSize(members, dtype.bits, self._alignment, last_padded=False, total_multiple=multiple, shards=shards)

    def _sharded_size(self, unit: Unit, dtype: DType) -> FlatSize:
        """`flatten_tensors`, then `_get_shard`: without ``use_orig_params`` only a sharded whole is padded."""
        padded = self._sharded or self.options.use_orig_params
        return self._size(unit, dtype, self._group if padded else (), self._group if self._sharded else ())

    def _padded_size(self, unit: Unit, dtype: DType) -> FlatSize:
        """`_padded_unsharded_size`."""
        return self._size(unit, dtype, self._group)

    def _unpadded_size(self, unit: Unit, dtype: DType) -> FlatSize:
        """`_unpadded_unsharded_size`, of gradients too; with ``use_orig_params`` padding is part of it."""
        return self._size(unit, dtype, self._group if self.options.use_orig_params else ())

    def _buffer(
        self, unit: Unit, label: str, size: FlatSize, dtype: DType, role: Role, stream: str = COMPUTE
    ) -> Storage:
        return buffer(f"{unit.name}.{label}", size, dtype, role, unit.slot, stream)

    def _shard(self, unit: Unit) -> Storage:
        """`_local_shard`."""
        size = self._sharded_size(unit, self._original)
        made = self._buffer(unit, "flat_param", size, self._original, Role.PARAMETER)
        made.persistent = True
        return made

    def _whole(self, unit: Unit) -> Storage:
        """`_full_param_padded`; without sharding, `_mp_shard`, which is then as big as the flat parameter."""
        size = self._padded_size(unit, self._compute) if self._sharded else self._sharded_size(unit, self._compute)
        stream = UNSHARD if self._sharded else PRE_UNSHARD
        return self._buffer(unit, "unsharded", size, self._compute, Role.GATHERED, stream)

    def _low_precision(self, unit: Unit) -> Storage:
        """`_mp_shard` of a sharded handle."""
        size = self._sharded_size(unit, self._compute)
        return self._buffer(unit, "mp_shard", size, self._compute, Role.GATHER, PRE_UNSHARD)

    def _gradient(self, unit: Unit) -> Storage:
        """What is in the flat parameter's `.grad` after backward."""
        size = self._sharded_size(unit, self._final)
        return self._buffer(unit, "gradient", size, self._final, Role.GRADIENT, self._gradient_stream())

    def _gradient_stream(self) -> str:
        """Autograd's own and what `prepare_gradient_for_optim` casts are made where everything else is computed."""
        if self._sharded:
            return COMPUTE if self._final != self._original else self._reduction_stream
        return COMPUTE if self._compute == self._reduce == self._final else POST_BACKWARD

    @property
    def _reduction_stream(self) -> str:
        """Where `_accumulate_sharded_grad` casts: after the all-reduce of hybrid sharding."""
        cast = self._reduce != self._original and self.job.plan.mesh.dp_replicate > 1
        return ALL_REDUCE if cast else POST_BACKWARD

    def _gradient_dtype(self) -> DType:
        """Of `.grad`, with ``keep_low_precision_grads`` (`prepare_gradient_for_optim`, `_reduce_grad_no_shard`)."""
        if not self._keeps_low:
            return self._original
        return self._compute if self._sharded else self._reduce

    # optimizer -----------------------------------------------------------------------------------------------------

    def _layout(self, unit: Unit) -> tuple[list[Member], list[int]]:
        """The weights in the unit's flat parameter, and its gaps, in elements."""
        whole = unit.slot is None and any(t.storage.slot is not None for t in unit.parameters)
        weights = self.job.weights() if whole else [(tensor, None) for tensor in unit.parameters]
        bindings = self.job.plan.dimensions.bindings
        ranks = self.job.plan.mesh.dp_shard * (1 if self._sharded else self.job.plan.mesh.dp_replicate)
        return lay_out(weights, bindings, self._alignment, ranks if self.options.use_orig_params else 1)

    def _parameters(self) -> list[Parameter]:
        """What the optimizer is given, in the order of ``parameters()``."""
        if not self.options.use_orig_params:
            return [self._flat_parameter(unit) for unit in self.handles]
        pieces = [piece for unit in self.handles for piece in self._pieces(unit)]
        place = {tensor.storage: index for index, tensor in enumerate(self.job.graph.parameters)}
        return [parameter for _, parameter in sorted(pieces, key=lambda piece: place[piece[0].storage])]

    def _flat_parameter(self, unit: Unit) -> Parameter:
        shard, dimensions = self._shard_of[unit], self.job.plan.dimensions
        dim = dimensions.bind(f"{shard.label}.elements", shard.size.elements(dimensions.bindings))
        return Parameter(shard, self._gradient_of[unit], ((dim,),))

    def _pieces(self, unit: Unit) -> list[tuple[Tensor, Parameter]]:
        """`_get_shard_metadata`: what of each weight is in the rank's shard; the others have no gradient there."""
        dimensions = self.job.plan.dimensions
        share = self._shard_of[unit].size.elements(dimensions.bindings)
        rank = self.job.plan.rank % self.job.plan.mesh.dp_shard if self._sharded else 0
        pieces = rank_pieces(self._layout(unit)[0], rank * share, (rank + 1) * share, dimensions)
        found = [(tensor, self._piece(unit, label, dims)) for tensor, label, dims in pieces]
        self._pieces_of[unit] = [parameter for _, parameter in found]
        return found

    def _piece(self, unit: Unit, label: str, dims: Sequence[Dim]) -> Parameter:
        size = size_of(tuple(dims), self._original.bits)
        storage = Storage(label, size, self._original, Role.PARAMETER, unit.slot, persistent=True)
        return Parameter(storage, self._gradient_of[unit], (tuple(dims),))

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Flat parameters, or the parts of weights that lie in this rank's shards."""
        return self._trained

    def cleared(self, gradients: Sequence[Storage]) -> list[Storage]:
        """With ``use_orig_params`` only views go: `_reset_flat_param_grad_info_if_needed` frees in the next forward."""
        return [] if self.options.use_orig_params else list(gradients)
