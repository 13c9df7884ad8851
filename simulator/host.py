"""What a rank keeps beside its device: host memory, page-locked or not, and NVMe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import attrs

from hardware.dtypes import FP32
from simulator.graph import Storage
from simulator.optimizers import optimizers
from simulator.optimizers.step import OptimizerStep, Parameter, Surroundings
from simulator.sizes import size_of

if TYPE_CHECKING:
    from simulator.plan import Plan

#: Optimizers that count the steps of each weight, in an fp32 scalar (torch/optim/adam.py `_init_group`).
COUNTING = ("adam", "adamw")


@attrs.frozen(kw_only=True)
class HostMemory:
    """Bytes of the tensors of one rank, without what an allocator rounds up."""

    pinned: int = 0
    """In page-locked memory, which cannot be swapped out."""
    pageable: int = 0
    nvme: int = 0
    """On drives, not in memory."""

    @property
    def nbytes(self) -> int:
        """In host memory, page-locked or not."""
        return self.pinned + self.pageable


def total(parts: Iterable[HostMemory]) -> HostMemory:
    """All of them together."""
    found = list(parts)
    return HostMemory(
        pinned=sum(each.pinned for each in found),
        pageable=sum(each.pageable for each in found),
        nvme=sum(each.nvme for each in found),
    )


def fullest_node(ranks: Iterable[tuple[HostMemory, int]], gpus: int) -> HostMemory:
    """What a node of `gpus` ranks keeps at most: those that keep the most, of classes of so many ranks each."""
    left, found = gpus, []
    for host, count in sorted(ranks, key=lambda each: (each[0].nbytes, each[0].nvme), reverse=True):
        found += [host] * min(left, count)
        left -= min(left, count)
    return total(found)


def saved_on_host(plan: Plan) -> HostMemory:
    """What offloaded activations are when backward begins (torch/autograd/graph.py `save_on_cpu`).

    Each saved tensor is there by itself, as large as the view of its storage that was saved.
    """
    if not plan.saved_on_host:
        return HostMemory()
    bindings, nbytes = plan.dimensions.bindings, 0
    for op in plan.graph.ops:
        repeats = 1 if op.place is None else plan.layout.places[op.place].repeats
        nbytes += repeats * sum(int(size_of(x.dims, x.dtype.bits).nbytes(bindings)) for x in op.packed)
    return HostMemory(**{plan.saved_on_host: nbytes})


def offloaded_training(
    plan: Plan, weights: Sequence[Storage], trained: Sequence[Parameter], *, pinned: bool
) -> HostMemory:
    """Weights, their gradients and the optimizer's states in host memory, as they are before an optimizer step ends.

    Args:
        plan: the run; its optimizer works on the host.
        weights: what a rank keeps of the weights.
        trained: those that the optimizer is given.
        pinned: whether weights and gradients are in page-locked memory; states never are (``zeros_like``).
    """
    given = _nbytes(plan, weights) + _nbytes(plan, dict.fromkeys(each.gradient for each in trained))
    states = _states(plan, trained)
    return HostMemory(pinned=given, pageable=states) if pinned else HostMemory(pageable=given + states)


def _states(plan: Plan, trained: Sequence[Parameter]) -> int:
    """Of what a step of the optimizer makes, that which stays."""
    optimizer, states = plan.training.optimizer, dict[tuple[Storage, str], Storage]()
    step = OptimizerStep(optimizer, trained, states, Surroundings(tensors="", dimensions=plan.dimensions))
    optimizers.get(optimizer.name)(step)
    kept = [storage for (weight, _), storage in states.items() if storage is not weight]
    counters = optimizer.name in COUNTING and optimizer.implementation != "fused"  # whose kernels have them as states
    scalars = sum(_repeats(plan, each.storage) for each in trained) * FP32.bits // 8 if counters else 0
    return _nbytes(plan, kept) + scalars


def _nbytes(plan: Plan, storages: Iterable[Storage]) -> int:
    bindings = plan.dimensions.bindings
    return sum(int(each.size.nbytes(bindings)) * _repeats(plan, each) for each in storages)


def _repeats(plan: Plan, storage: Storage) -> int:
    return 1 if storage.slot is None else plan.layout.places[storage.slot].repeats
