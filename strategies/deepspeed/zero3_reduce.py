"""ZeRO-3's reduction: how gradients fill the bucket, and what is copied when it is reduced.

Source: DeepSpeed 0.19.8 deepspeed/runtime/zero/stage3.py and deepspeed/runtime/comm/coalesced_collectives.py
(function named per method).
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from hardware.dtypes import DType
from simulator.graph import Storage
from simulator.roles import Role
from simulator.runtime import Job, Turn, buffer
from simulator.sizes import ALLOCATION_GRANULARITY, FlatSize
from strategies.deepspeed.coordinator import Weight


@attrs.frozen
class Reduction:
    """The options that shape it."""

    limit: int
    """``reduce_bucket_size``."""
    scatters: bool
    """``reduce_scatter``."""
    contiguous: bool
    """``contiguous_gradients``."""
    accumulates: DType
    """``grad_accum_dtype``."""
    stream: str


class Reducer:
    """The IPG bucket of one micro-batch."""

    def __init__(self, job: Job, options: Reduction, order: dict[Weight, int]) -> None:
        self.job, self.options = job, options
        self._order = order
        self._dtype = job.plan.training.weights
        self._ranks, self._rank = job.plan.mesh.dp_shard, job.plan.rank
        self._weights: list[Weight] = []
        self._kept: list[Storage] = []
        """Gradients that are not in the bucket's buffer."""

    def fork(self) -> Reducer:
        """A copy that goes on from here."""
        other = Reducer(self.job, self.options, self._order)
        other._weights, other._kept = self._weights.copy(), self._kept.copy()
        return other

    def add(self, weight: Weight, gradient: Storage) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`, `__add_grad_to_ipg_bucket`."""
        filled = sum(held.elements for held in self._weights)
        if self._weights and filled + weight.elements > self.options.limit:
            self.flush()
        if self.options.contiguous and weight.elements <= self.options.limit:
            self.job.free(gradient)
        else:
            self._kept.append(gradient)
        self._weights.append(weight)

    def flush(self) -> None:
        """`__reduce_and_partition_ipg_grads`: reduce, add to the rank's partitions, let go of the gradients."""
        if not self._weights:
            return
        filled = sum(weight.elements for weight in self._weights)
        in_bucket = self.options.contiguous and filled <= self.options.limit
        results = self._all_reduce() if in_bucket and not self.options.scatters else self._reduce_scatter()
        self.partition(self._weights)
        self.job.free(*self._kept)
        self.job.free(*results)
        self._kept.clear()
        self._weights.clear()

    def turn(self, turn: Turn) -> None:
        """Backward of a micro-batch begins."""

    def partition(self, weights: Sequence[Weight]) -> None:
        """`partition_grads`: added to partitions that are on the device, nothing is made."""

    def _made(self, label: str, size: FlatSize, dtype: DType) -> Storage:
        return buffer(f"reduce.{label}", size, dtype, Role.REDUCE, self.job.recorder.slot, self.options.stream)

    def _reduce_scatter(self) -> list[Storage]:
        """`__avg_scatter_grads`, `reduce_scatter_coalesced`: slices in the order of ranks, padded one by one."""
        self._weights.sort(key=self._order.__getitem__)
        sliced: list[Storage] = []
        if len(self._weights) > 1 or self._weights[0].elements % self._ranks:
            pads = self._pads()
            if pads:
                self.job.allocate("empty", *pads)
            members = tuple((1, weight.dims) for weight in self._weights)
            size = FlatSize(members, self._dtype.bits, member_multiple="dp_shard")
            sliced.append(self._made("slices", size, self._dtype))
            self.job.allocate("cat", *sliced)
            self.job.free(*pads)
        return self._in_accumulation_dtype(sliced)

    def _in_accumulation_dtype(self, sliced: list[Storage]) -> list[Storage]:
        """The rank's own slices, cast one by one where gradients accumulate in another element type."""
        if self.options.accumulates == self._dtype:
            return sliced
        casts = []
        for number, weight in enumerate(self._weights):
            size = FlatSize(((1, (self._own(weight),)),), self.options.accumulates.bits)
            casts.append(self._made(f"cast.{number}", size, self.options.accumulates))
            self.job.allocate("_to_copy", casts[-1])
        self.job.free(*sliced)
        return casts

    def _all_reduce(self) -> list[Storage]:
        """`__avg_scatter_contiguous_grads`: reduced in place, multiplied into a copy, padded where slices are short."""
        size = FlatSize(tuple((1, weight.dims) for weight in self._weights), self._dtype.bits)
        results: list[Storage] = []
        if self._ranks > 1:
            results.append(self._made("product", size, self._dtype))
            self.job.allocate("mul", *results)
        accumulates = self.options.accumulates
        if accumulates != self._dtype:
            cast = self._made("cast", attrs.evolve(size, bits=accumulates.bits), accumulates)
            self.job.allocate("_to_copy", cast)
            self.job.free(*results)
            results = [cast]
        for number, weight in enumerate(self._weights):
            if self._own(weight) < self._share(weight):
                padded = FlatSize(((1, (self._share(weight),)),), accumulates.bits)
                results.append(self._made(f"padded.{number}", padded, accumulates))
                self.job.allocate("zeros", results[-1])
        return results

    def _share(self, weight: Weight) -> int:
        """Elements of a rank's partition of it."""
        return -(-weight.elements // self._ranks)

    def _own(self, weight: Weight) -> int:
        """Elements of the weight itself in this rank's partition."""
        share = self._share(weight)
        return max(0, min(share, weight.elements - self._rank * share))

    def _pads(self) -> list[Storage]:
        """What fills up the slices of ranks that get less than others: a tensor for each."""
        granule = 8 * ALLOCATION_GRANULARITY // self._dtype.bits
        pads: list[Storage] = []
        for number, weight in enumerate(self._weights):
            share = self._share(weight)
            full, rest = divmod(weight.elements, share)
            empty = self._ranks - full - (1 if rest else 0)
            members = [(empty, (share,))] if empty else []
            members += [(1, (share - rest,))] if rest else []
            if members:
                size = FlatSize(tuple(members), self._dtype.bits, member_multiple=granule)
                pads.append(self._made(f"pad.{number}", size, self._dtype))
        return pads
