"""ZeRO-1 as torch has it: each rank updates whole weights of its own (`ZeroRedundancyOptimizer`).

Technique: Rajbhandari et al., arXiv:1910.02054, section 5.1 (P_os), by whole parameters instead of flat shards.
Behaviour: torch 2.13 torch/distributed/optim/zero_redundancy_optimizer.py (function named per method).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.graph import Storage, Tensor, flat
from simulator.optimizers.step import Parameter
from simulator.plan import Plan, RankClass
from simulator.roles import Role
from simulator.runtime import Job, Runtime, buffer
from simulator.sizes import FlatSize, size_of
from strategies.ddp import Ddp
from strategies.options import flag, option


@attrs.frozen(kw_only=True)
class ZeroRedundancy:
    """`ZeroRedundancyOptimizer` over the ranks of DDP; the simulated rank is the plan's.

    Ranks differ: the one with the embedding holds the most. `overlap_with_ddp` is not modelled.
    """

    parameters_as_bucket_view: bool = option(False, flag, "each rank's weights lie in one flat buffer")
    name: str = attrs.field(default="zero_redundancy", init=False)
    axis: ClassVar[str] = "dp_replicate"
    around_liger: ClassVar[bool] = True

    def __call__(self, plan: Plan) -> Plan:
        """The plan in which the rank's optimizer holds its own weights' state."""
        if not any(isinstance(hooks, Ddp) for hooks in plan.hooks):
            raise UnsupportedError(f"{self.name} shards the optimizer of ddp: apply ddp before it")
        ranks = plan.mesh.dp_replicate
        if not 0 <= plan.rank < ranks:
            raise UsageError(f"'rank' must be from 0 to {ranks - 1}, the ranks of dp_replicate {ranks}: {plan.rank}")
        return attrs.evolve(plan, hooks=(*plan.hooks, self))

    def rank_classes(self, plan: Plan) -> list[RankClass]:
        """Ranks with equally many elements to update together, the fullest first."""
        job = Job(plan)
        sizes = _elements(job)
        by_total: dict[int, list[int]] = {}
        for rank, own in enumerate(partition(sizes, plan.mesh.dp_replicate)):
            by_total.setdefault(sum(sizes[index] for index in own), []).append(rank)
        ordered = sorted(by_total.items(), reverse=True)
        others = plan.mesh.world // plan.mesh.dp_replicate
        return [RankClass.of(ranks, others) for _, ranks in ordered]

    def start(self, job: Job) -> ZeroRedundancyRuntime:
        """Partition the weights."""
        return ZeroRedundancyRuntime(job, self)


class ZeroRedundancyRuntime(Runtime):
    """The partition, and the rank's share of it."""

    def __init__(self, job: Job, options: ZeroRedundancy) -> None:
        super().__init__(job)
        weights = job.weights()
        self._partition = partition(_elements(job), job.plan.mesh.dp_replicate)
        self._own = [(weights[i][0], _of_one_layer(*weights[i])) for i in self._partition[job.plan.rank]]
        if options.parameters_as_bucket_view:
            job.keep_instead(self._flat_weights([t for t, _ in weights]))

    def _flat_weights(self, weights: Sequence[Tensor]) -> list[Storage]:
        """`_build_param_buckets`: the weights of each rank in one buffer; a dummy where a rank has none."""
        made = []
        for rank, indices in enumerate(self._partition):
            members = tuple((1, weights[index].dims) for index in indices) or ((1, ()),)
            dtype = weights[0].dtype
            made.append(buffer(f"parameters of rank {rank}", FlatSize(members, dtype.bits), dtype, Role.PARAMETER))
            made[-1].persistent = True
        return made

    def updated(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """The rank's own weights, each of its real layer: the others' state lives on other ranks."""
        gradients = {parameter.storage: parameter.gradient for parameter in parameters}
        return [Parameter(storage, gradients[tensor.storage], tensor.shape) for tensor, storage in self._own]


def _elements(job: Job) -> list[int]:
    bindings = job.plan.dimensions.bindings
    return [int(tensor.storage.size.elements(bindings)) for tensor, _ in job.weights()]


def _of_one_layer(tensor: Tensor, layer: int | None) -> Storage:
    """A weight of one layer, whose state is not repeated over the layers that its slot stands for."""
    if layer is None:
        return tensor.storage
    label = f"layers.{layer}.{tensor.storage.label}"
    size = size_of(flat(tensor.shape), tensor.dtype.bits)
    return Storage(label, size, tensor.dtype, Role.PARAMETER, persistent=True)


def partition(elements: Sequence[int], ranks: int) -> list[list[int]]:
    """`_partition_parameters`: the largest weight first, each to the rank with the fewest elements so far.

    Returns:
        Per rank the indices into `elements`, in the order in which they are assigned.
    """
    own: list[list[int]] = [[] for _ in range(ranks)]
    filled = [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(elements)), key=lambda i: -elements[i]):
        total, rank = filled[0]
        own[rank].append(index)
        heapq.heapreplace(filled, (total + elements[index], rank))
    return own
