"""The flat buffer of ZeRO-1 and ZeRO-2, its partition over the ranks, and how gradients fill the reduce bucket.

Source: DeepSpeed deepspeed/runtime/zero/stage_1_and_2.py (function named per method). What a bucket holds when it is
flushed depends on bytes, so these decisions are made on ints, over every layer of the real model; layers in which the
same happens look alike, so that a few of them are built.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from functools import cached_property

import attrs

from hardware.dtypes import FP32
from simulator.graph import ForwardGraph, Storage
from simulator.plan import Plan
from simulator.runtime import Job
from simulator.sizes import Dim, FlatSize
from strategies.flat import Member, lay_out

#: ``nccl_start_alignment_factor``: partitions start at multiples of 4 bytes, 2 elements of 16 bits.
START_ALIGNMENT = 2


class FlatBuffer:
    """All weights one after the other, in the order of ``model.parameters()``, cut into equal partitions."""

    def __init__(self, plan: Plan) -> None:
        self.ranks = plan.mesh.dp_shard
        multiple = START_ALIGNMENT * self.ranks
        self.members, gaps = lay_out(Job(plan).weights(), plan.dimensions.bindings, 1, multiple)
        self.partition = (self.members[-1].end + sum(gaps)) // self.ranks
        self._graph = plan.graph

    def is_own(self, member: Member, rank: int) -> bool:
        """`get_partition_info`: whether the weight touches the partition of `rank`."""
        return member.start < (rank + 1) * self.partition and member.end > rank * self.partition

    def own(self, rank: int) -> list[Member]:
        """The weights that touch the partition of `rank`."""
        return [member for member in self.members if self.is_own(member, rank)]

    def pieces(self, rank: int) -> list[int]:
        """`get_flat_partition`: the elements of each weight in the partition of `rank`, then of padding, if any."""
        first, end = rank * self.partition, (rank + 1) * self.partition
        found = [min(end, member.end) - max(first, member.start) for member in self.own(rank)]
        padding = self.partition - sum(found)
        return [*found, padding] if padding else found

    def slices(self, member: Member) -> list[tuple[int, int]]:
        """The partitions that the weight lies in, with its elements in each."""
        first, last = member.start // self.partition, (member.end - 1) // self.partition
        edges = [member.start, *(rank * self.partition for rank in range(first + 1, last + 1)), member.end]
        return [(rank, edges[i + 1] - edges[i]) for i, rank in enumerate(range(first, last + 1))]

    @cached_property
    def arrivals(self) -> list[Member]:
        """The weights in the order in which backward finishes their gradients: against that of their first use."""
        uses = _first_uses(self._graph)
        layers = [index for index, op in enumerate(self._graph.ops) if op.slot is not None]

        def key(member: Member) -> tuple[int, int, tuple[int, int]]:
            use = uses[member.tensor.storage]
            if member.layer is not None:
                return 1, member.layer, use
            return (2 if layers and use[0] > layers[0] else 0), 0, use

        return sorted(self.members, key=key, reverse=True)


def flat_size(job: Job, bits: int, *, partition: bool = False) -> FlatSize:
    """All weights in one buffer, or a rank's partition of it (`flatten_dense_tensors_aligned`)."""
    members = tuple((job.repeats(t.storage.slot), t.dims) for t in job.graph.parameters)
    shards: tuple[Dim, ...] = ("dp_shard",) if partition else ()
    return FlatSize(members, bits, total_multiple=(START_ALIGNMENT, "dp_shard"), shards=shards)


def partition_dim(job: Job) -> Dim:
    """The dimension of a rank's partition, in elements."""
    dimensions = job.plan.dimensions
    return dimensions.bind("partition", flat_size(job, FP32.bits, partition=True).elements(dimensions.bindings))


def _first_uses(graph: ForwardGraph) -> dict[Storage, tuple[int, int]]:
    """Op and position at which each weight is used first: its gradient is complete when backward gets there.

    Of the weights of one op the gradient of the first input comes first.
    """
    uses: dict[Storage, tuple[int, int]] = {}
    for index, op in enumerate(graph.ops):
        for position, tensor in enumerate(op.inputs):
            if tensor.is_parameter:
                uses.setdefault(tensor.storage, (index, -position))
    return uses


@attrs.frozen
class Flush:
    """`reduce_ipg_grads`: the bucket is reduced; of one that spans partitions, copies of so many elements are made."""

    copies: tuple[int, ...]
    opens_partition: bool
    """Whether it is the first with gradients of the rank's own partition, whose buffer is then allocated."""
    releases: bool
    """Whether a gradient too large for the bucket is let go."""
    own: int
    """Elements of the rank's own partition in the weight that has most of them."""


@attrs.frozen
class Arrival:
    """What happens when a gradient arrives: perhaps a flush before it, then it moves into the bucket or stays."""

    flush: Flush | None
    oversized: bool


class Bucket:
    """`reduce_independent_p_g_buckets_and_remove_grads` over a sequence of gradients, on ints."""

    def __init__(self, flat: FlatBuffer, size: int, rank: int, *, scatters: bool, keeps_foreign: bool) -> None:
        self._flat, self._size, self._rank = flat, size, rank
        self._scatters, self._keeps_foreign = scatters, keeps_foreign
        self._held: list[Member] = []
        self._opened = False

    def arrivals(self, weights: Iterable[Member]) -> tuple[dict[Member, Arrival], Flush | None]:
        """What happens at the arrival of each weight's gradient, and the flush at the end."""
        found = {}
        for weight in weights:
            filled = sum(held.elements for held in self._held)
            flush = self._flush() if filled + weight.elements > self._size else None
            found[weight] = Arrival(flush, weight.elements > self._size)
            self._held.append(weight)
        return found, self._flush()

    def _flush(self) -> Flush | None:
        held, self._held = self._held, []
        if not held:
            return None
        own = [self._flat.is_own(weight, self._rank) for weight in held]
        opens = any(own) and not self._opened
        self._opened = self._opened or any(own)
        oversized = held[0].elements > self._size
        shares = [elements for weight in held for rank, elements in self._flat.slices(weight) if rank == self._rank]
        releases = oversized and (own[0] or not self._keeps_foreign)
        return Flush(self._copies(held), opens, releases, max(shares, default=0))

    def _copies(self, held: Sequence[Member]) -> tuple[int, ...]:
        """`average_tensor`, `allreduce_and_scatter`: slices of one partition are merged, several are flattened."""
        if not self._scatters:
            return ()
        merged: list[list[int]] = []
        for weight in held:
            for rank, elements in self._flat.slices(weight):
                if merged and merged[-1][0] == rank:
                    merged[-1][1] += elements
                else:
                    merged.append([rank, elements])
        copies, part = [], []
        for _, elements in merged:
            part.append(elements)
            if sum(part) > self._size:
                copies.append(part)
                part = []
        return tuple(sum(part) for part in (*copies, part) if len(part) > 1)


def layer_kinds(plan: Plan, arrivals: dict[Member, Arrival]) -> tuple[Hashable, ...]:
    """Per layer what happens to its gradients: layers in which it differs are built one by one."""
    kinds: list[list[Arrival]] = [[] for _ in plan.model.layers]
    for weight, arrival in arrivals.items():
        if weight.layer is not None:
            kinds[weight.layer].append(arrival)
    return tuple(tuple(kind) for kind in kinds)
