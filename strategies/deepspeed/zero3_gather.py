"""How ZeRO-3 gathers weights and lets go of them: flat buffers, copies, and what ZeRO++ adds to them.

Source: DeepSpeed 0.19.8 deepspeed/runtime/zero/partition_parameters.py (function named per method).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import attrs

from hardware.dtypes import FP16, FP32, INT8, DType
from hardware.errors import UnsupportedError
from simulator.graph import Storage
from simulator.roles import Role
from simulator.runtime import Job, buffer
from simulator.sizes import FlatSize, size_of
from strategies.deepspeed.coordinator import Weight

#: `CUDAQuantizer.target_group_size` and the limit that its assertion sets.
GROUP_ELEMENTS, LARGEST_GROUP = 8000, 16000


@attrs.frozen
class Gathering:
    """The options that shape a gather."""

    stream: str
    sequential: bool
    """``stage3_allgather_sequential``: each weight by itself."""
    quantized: bool
    """``zero_quantized_weights``."""
    secondary: int
    """``zero_hpz_partition_size``."""


@attrs.define(eq=False)
class _Handle:
    """`AllGatherCoalescedHandle`: its buffers live until each of its weights has been waited for."""

    weights: list[Weight]
    buffers: list[Storage]
    single: bool = False
    split: bool = False


def quantizer_groups(elements: int) -> int:
    """`CUDAQuantizer.quantize`: groups with a scale each.

    Raises:
        UnsupportedError: where its assertions fail.
    """
    groups = -(-elements // GROUP_ELEMENTS)
    while groups < elements and elements % (8 * groups):
        groups += 1
    while elements % (16 * groups) == 0 and elements / groups > GROUP_ELEMENTS:
        groups *= 2
    if elements % (8 * groups) or not elements / LARGEST_GROUP < groups < elements:
        raise UnsupportedError(
            f"'zero_quantized_weights' cannot quantize a partition of {elements} elements: its groups are multiples "
            "of 8; leave it out or take other ranks"
        )
    return groups


class Gatherer:
    """What the coordinator's gathers, waits and releases allocate and free."""

    def __init__(self, job: Job, options: Gathering, weights: Iterable[Weight]) -> None:
        self.job, self.options = job, options
        self._dtype = job.plan.training.weights
        self._ranks = job.plan.mesh.dp_shard
        self._serial = 0
        self._handles: dict[Weight, _Handle] = {}
        self._gathered: dict[Weight, Storage] = {}
        self._saved: dict[Weight, Storage] = {}
        """Gathered weights that a recomputed layer has saved: they may outlive their release."""
        self._second = {weight: self._secondary(weight) for weight in weights} if options.secondary > 1 else {}
        self.seconds: set[Weight] = set(self._second)
        """Weights that have a secondary partition: all from the beginning, until the first optimizer step."""

    def fork(self) -> Gatherer:
        """A copy that goes on from here."""
        other = copy.copy(self)
        handles = {id(h): attrs.evolve(h, buffers=h.buffers.copy()) for h in self._handles.values()}
        other._handles = {weight: handles[id(handle)] for weight, handle in self._handles.items()}
        other._gathered, other._saved = self._gathered.copy(), self._saved.copy()
        return other

    def holding(self, weights: Iterable[Weight]) -> dict[Weight, Storage]:
        """Those of `weights` that are gathered, and where."""
        return {weight: self._gathered[weight] for weight in weights if weight in self._gathered}

    def hold(self, weight: Weight, storage: Storage) -> None:
        """A weight that is gathered from the beginning."""
        self._gathered[weight] = storage

    # sizes ---------------------------------------------------------------------------------------------------------

    def whole(self, weight: Weight, label: str, *, padded: bool) -> Storage:
        """A gathered weight: as all partitions are (`_aligned_size`), or as it is itself."""
        size = self._flat_size([weight], self._dtype) if padded else size_of(weight.dims, self._dtype.bits)
        slot = weight.storage.slot
        saved = self._saved.get(weight)
        again = " (again)" if saved is not None and self.job.recorder.references(saved) else ""
        label = f"{weight.storage.label}.{label}{again}"
        return buffer(label, size, self._dtype, Role.GATHERED, slot, self.options.stream)

    def _flat_size(self, weights: Sequence[Weight], dtype: DType, *, shard: bool = False) -> FlatSize:
        """Weights padded to the ranks one by one; of all ranks, or of one."""
        members = tuple((1, weight.dims) for weight in weights)
        return FlatSize(members, dtype.bits, member_multiple="dp_shard", shards=("dp_shard",) if shard else ())

    def _secondary(self, weight: Weight) -> Storage:
        """`_partition_param_sec`: what hpZ keeps of a weight for backward."""
        size = attrs.evolve(self._flat_size([weight], self._dtype), shards=(self.options.secondary,))
        label = f"{weight.storage.label}.secondary"
        return buffer(label, size, self._dtype, Role.POST_FORWARD_SHARD, weight.storage.slot)

    def _buffer(self, label: str, size: FlatSize, dtype: DType) -> Storage:
        self._serial += 1
        return buffer(f"{label}.{self._serial}", size, dtype, Role.GATHER, stream=self.options.stream)

    def _made(self, label: str, size: FlatSize, dtype: DType) -> Storage:
        made = self._buffer(label, size, dtype)
        self.job.allocate(label, made)
        return made

    # gathering -----------------------------------------------------------------------------------------------------

    def gather(self, weights: Sequence[Weight]) -> None:
        """`__all_gather_params_`: those with a secondary partition apart from the others."""
        if self._ranks == 1:  # `_no_gather_coalesced`: the partition is the weight
            return
        for second in (True, False):
            among = [weight for weight in weights if (weight in self.seconds) is second]
            if len(among) == 1 or self.options.sequential:
                for weight in among:
                    self._gather_one(weight)
            elif among:
                self._gather_several(among)

    def _gather_one(self, weight: Weight) -> None:
        """`_all_gather_sequential`: the buffer becomes the weight, unless it has to be dequantized."""
        if self.options.quantized:
            handle = _Handle([weight], self._quantized([weight]), single=True)
            self._handles[weight] = handle
        else:
            self._gathered[weight] = self.whole(weight, "gathered", padded=True)
            self.job.allocate("_all_gather_sequential", self._gathered[weight])

    def _gather_several(self, weights: list[Weight]) -> None:
        """`_all_gather_coalesced`: one flat buffer."""
        if self.options.quantized:
            buffers = self._quantized(weights)
        else:
            buffers = [self._made("_all_gather_dtype", self._flat_size(weights, self._dtype), self._dtype)]
        self._handles.update(dict.fromkeys(weights, _Handle(weights, buffers)))

    def _quantized(self, weights: list[Weight]) -> list[Storage]:
        """Quantize the shards, through fp16; what is gathered are the results and their scales."""
        ranks = self.options.secondary if weights[0] in self.seconds else self._ranks
        shares = attrs.evolve(self._flat_size(weights, self._dtype), shards=(ranks,))
        flat = self._made("all_gather_int8", self._flat_size(weights, INT8), INT8)
        inputs = [self._made("cat", shares, self._dtype)] if len(weights) > 1 else []
        if self._dtype != FP16:
            inputs.append(self._made("_to_copy", attrs.evolve(shares, bits=FP16.bits), FP16))
        groups = quantizer_groups(int(shares.elements(self.job.plan.dimensions.bindings)))
        results = [self._made("quantize", attrs.evolve(shares, bits=INT8.bits), INT8)]
        results.append(self._made("scales", FlatSize(((1, (groups,)),), FP32.bits), FP32))
        self.job.free(*inputs)
        scales = self._made("all_gather_scales", FlatSize(((ranks, (groups,)),), FP32.bits), FP32)
        self.job.free(*results)
        return [flat, scales]

    # waiting -------------------------------------------------------------------------------------------------------

    def wait(self, weight: Weight) -> None:
        """`AllGatherCoalescedHandle.wait`: a copy of each weight; the buffer goes with the last that was waited for."""
        handle = self._handles.pop(weight, None)
        if handle is None:
            return
        if not handle.split:
            handle.split = True
            self._split(handle)
        if handle not in self._handles.values():
            self.job.free(*handle.buffers)

    def _split(self, handle: _Handle) -> None:
        if handle.single:
            self._cast_out(handle.weights[0], "dequantize")
            return
        if self.options.quantized:
            handle.buffers.append(self._made("dequantize", self._flat_size(handle.weights, FP16), FP16))
        for weight in handle.weights:
            self._cast_out(weight, "cat")

    def _cast_out(self, weight: Weight, kernel: str) -> None:
        """A weight in a storage of its own; what was dequantized is fp16 first."""
        made = self._gathered[weight] = self.whole(weight, "gathered", padded=False)
        if not self.options.quantized or self._dtype == FP16:
            self.job.allocate(kernel, made)
            return
        half = self._made(kernel, FlatSize(((1, weight.dims),), FP16.bits), FP16)
        self.job.allocate("_to_copy", made)
        self.job.free(half)

    def release(self, weight: Weight) -> None:
        """`free_param`; with hpZ a secondary partition is made first (`_partition_param_sec`)."""
        if self._second and weight not in self.seconds:
            self.seconds.add(weight)
            self.job.allocate("_partition_param_sec", self._second[weight])
        if self._ranks > 1:
            self.job.free(self._gathered.pop(weight))

    def save(self, weight: Weight) -> Storage | None:
        """Where a weight is that recomputation saves, if it was gathered in this micro-batch."""
        gathered = self._gathered.get(weight)
        if gathered is None or not self.job.recorder.references(gathered):
            return None
        self._saved[weight] = gathered
        return gathered

    def secondaries(self, weights: Iterable[Weight]) -> list[Storage]:
        """The secondary partitions of `weights`; none without hpZ."""
        return [self._second[weight] for weight in weights if weight in self._second]
