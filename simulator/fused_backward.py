"""Gradients inside the kernels of a compiled layer: in registers until something else wants them in memory.

Each is an empty storage that keeps what it is computed from, so that the engine counts references as it always does.
"""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import DType
from simulator.graph import ForwardGraph, Op, Shape, Storage, Tensor, flat, make_storage, make_tensor
from simulator.recorder import Recorder
from simulator.roles import Role
from simulator.sizes import Dim, size_of


class FusedKernels:
    """What fused kernels do to the gradients of one backward pass."""

    def __init__(self, graph: ForwardGraph, recorder: Recorder) -> None:
        self.graph = graph
        self.recorder = recorder

    def virtual(self, label: str, shape: Shape, dtype: DType, memory: tuple[Dim, ...] | None) -> Tensor:
        """A tensor that a kernel has in registers only."""
        tensor = make_tensor(make_storage(label, (0,), dtype, Role.BACKWARD, self.recorder.slot), shape, dtype)
        tensor.memory = memory or tensor.memory
        return tensor

    @staticmethod
    def is_virtual(gradient: Tensor) -> bool:
        """Whether it is such a tensor."""
        return 0 in getattr(gradient.storage.size, "dims", ())

    def hold_sources(self, results: Sequence[Tensor | None], read: Sequence[Storage]) -> None:
        """Keep what a kernel reads until all that it computes is in memory."""
        for storage in {g.storage: None for g in results if g is not None and self.is_virtual(g)}:
            if storage not in read:
                self.recorder.hold_for(storage, read)

    def stays(self, op: Op, gradient: Tensor, tensor: Tensor) -> bool:
        """Whether the `gradient` of `tensor`, an input of `op`, stays as it is: no other kernel wants it."""
        if not op.fused:
            return True
        maker = None if tensor.producer is None else self.graph.ops[tensor.producer]
        inside = maker is not None and maker.fused and maker.slot == op.slot
        return inside or not self.is_virtual(gradient)

    def in_place(self, gradient: Tensor) -> Tensor | None:
        """The gradient written over what dies with it, where that is as large; the caller's reference goes there."""
        size = size_of(flat(gradient.shape), gradient.dtype.bits)
        dying = self.recorder.dying_with(gradient.storage)
        place = next((s for s in dying if s.size == size and s.dtype == gradient.dtype), None)
        if place is None:
            return None
        self.recorder.retain(place)
        self.recorder.release(gradient.storage)
        return Tensor(place, gradient.shape, gradient.memory, gradient.dtype)

    def total(self, label: str, old: Tensor, new: Tensor) -> Tensor:
        """The sum of two gradients inside the kernel that reads both, which hands over its references."""
        total = self.virtual(label, old.shape, old.dtype, old.memory)
        self.recorder.run("fused_backward", [total.storage])
        self.recorder.hold_for(total.storage, [old.storage, new.storage])
        self.recorder.release(old.storage)
        self.recorder.release(new.storage)
        return total
