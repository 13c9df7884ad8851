"""Backward derived from the forward graph, in the order and with the ownership rules of torch's engine.

Source: torch/csrc/autograd/engine.cpp (`evaluate_function`, `call_function`, `validate_outputs`),
input_buffer.cpp (`InputBuffer::accumulate`) and functions/accumulate_grad.h (`AccumulateGrad`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import attrs

from hardware.dtypes import DType
from simulator.fused_backward import FusedKernels
from simulator.fusion_order import kernel_order
from simulator.graph import ForwardGraph, Op, Shape, Storage, Tensor, flat, make_storage, make_tensor
from simulator.recorder import Recorder
from simulator.roles import Phase, Role
from simulator.runtime import Runtime
from simulator.sizes import Dim

if TYPE_CHECKING:
    from simulator.checkpoints import Checkpoints, Region


@attrs.define(eq=False)
class Inner:
    """A backward that runs inside that of the whole graph (reentrant checkpointing)."""

    region: Region
    received: list[Storage]
    """The gradients it was started with, which the outer node holds."""
    totals: dict[Storage, tuple[Tensor, Tensor]] = attrs.field(factory=dict)
    """Arguments of the region, detached from the graph outside, and the gradients that they have so far."""


def is_broadcast(gradient: Tensor, tensor: Tensor) -> bool:
    """Whether `gradient` has to be summed to the shape of `tensor`: it has axes or dimensions that `tensor` lacks."""
    return len(gradient.dims) > len(tensor.dims) or len(gradient.shape) > len(tensor.shape)


class Autograd:
    """One backward pass over a forward graph.

    Args:
        graph: the forward pass.
        recorder: where steps and references go on from the end of forward.
        checkpoints: looks up what an op saved, recomputing it first where checkpointing dropped it.
        gradients: parameter storage to gradient storage; filled here. A parameter that is in it
            already (gradient accumulation, ``zero_grad(set_to_none=False)``) accumulates in place.
        runtimes: what frameworks do before each node and after each accumulated gradient.
        kernel_workspace: whether to count what kernels allocate for themselves, unseen by the dispatcher.
    """

    def __init__(
        self,
        graph: ForwardGraph,
        recorder: Recorder,
        checkpoints: Checkpoints,
        gradients: dict[Storage, Storage],
        *,
        runtimes: Sequence[Runtime] = (),
        kernel_workspace: bool = True,
    ) -> None:
        self.graph = graph
        self._runtimes = runtimes
        self._weights_are_views = any(runtime.weights_are_views for runtime in runtimes)
        self.recorder = recorder
        self.gradients = gradients
        self.kernel_workspace = kernel_workspace
        self._checkpoints = checkpoints
        self._inner: Inner | None = None
        self.kept: list[Storage] = []
        """Gradients of leaves that are made anew in every micro-batch: they last as long as the graph."""
        self.entered_with: set[Hashable] = set()
        """The forms of the gradients with which backward enters layers."""
        self._pending: dict[int, list[Tensor | None]] = {}
        self._leaves: dict[Storage, Tensor] = {}
        self._expected = self._count_leaf_uses()
        self._made: list[Tensor] = []
        self._numbers: Counter[tuple[int | None, str]] = Counter()
        self._node: Op | None = None
        self._found: tuple[list[Storage], list[Storage]] = ([], [])
        self._overwritten: list[Storage] = []
        self._kernels = FusedKernels(graph, recorder)
        self._fusing = False
        """Whether the node being evaluated is part of a fused kernel: what it makes is not in memory."""
        # a second micro-batch's gradients live beside the first's, so they need names of their own
        self._tag = "more" if gradients else "grad"

    def run(self, loss: Tensor) -> None:
        """Backward from the loss to every parameter."""
        self.recorder.phase = Phase.BACKWARD
        seed = self.fresh("ones_like.default", loss.shape, loss.dtype)
        self._made.clear()
        self.recorder.retain(seed.storage)  # the caller of backward() holds it to the end
        self.run_from(loss, self._loss_gradient(seed))
        self.recorder.release(seed.storage)

    def run_from(self, output: Tensor, gradient: Tensor) -> None:
        """Backward from `output` to every parameter, begun with the `gradient` of it."""
        assert output.producer is not None
        self.recorder.phase = Phase.BACKWARD
        self._pending[output.producer] = [gradient]
        place: int | None = None
        for index in kernel_order(self.graph, output.producer):
            if self._inner is not None and index < self._inner.region.first:
                self._leave(self._inner)
            gradients = self._pending.pop(index, None)
            if gradients is not None:
                before, place = place, self.graph.ops[index].place
                if place is not None and place != before:
                    self.entered_with.add(self._forms(gradients))
                self._enter(self.graph.ops[index], gradients)
                self._evaluate(self.graph.ops[index], gradients)
        for runtime in self._runtimes:
            runtime.end_backward()

    def _forms(self, gradients: Sequence[Tensor | None]) -> Hashable:
        """What decides how `gradients` are added to: a view, and what others hold, is not written over."""
        found = [gradient for gradient in gradients if gradient is not None]
        references = [self.recorder.references(gradient.storage) for gradient in found]
        return tuple((g.is_view, g.shape, g.memory, g.dtype, n) for g, n in zip(found, references, strict=True))

    def _loss_gradient(self, seed: Tensor) -> Tensor:
        gradient = seed
        for runtime in self._runtimes:
            given, gradient = gradient, runtime.seed(self, gradient)
            if gradient is not given:
                self._replace(given, gradient)
        return gradient

    # what rules call -----------------------------------------------------------------------------------------------

    def fresh(self, name: str, shape: Shape, dtype: DType, memory: tuple[Dim, ...] | None = None) -> Tensor:
        """Run kernel `name`, which allocates one tensor."""
        tensor = self.prepare(name, shape, dtype, memory)
        self.recorder.run(name, [tensor.storage])
        return tensor

    def prepare(self, name: str, shape: Shape, dtype: DType, memory: tuple[Dim, ...] | None = None) -> Tensor:
        """A tensor that a kernel with several outputs will allocate; pass it to `kernel`."""
        label = self._label(name)
        if self._fusing:
            tensor = self._kernels.virtual(label, shape, dtype, memory)
        else:
            storage = make_storage(label, flat(shape), dtype, Role.BACKWARD, self.recorder.slot)
            tensor = make_tensor(storage, shape, dtype)
            tensor.memory = memory or tensor.memory
        self._made.append(tensor)
        return tensor

    def _label(self, name: str) -> str:
        """The label of what kernel `name` makes: numbered among its like in a module of a layer.

        So layers label alike what they have in common, even where one of them needs a kernel more than the others.
        """
        label = f"{self.recorder.module}.{self._tag}.{name}"
        self._numbers[self.recorder.slot, label] += 1
        return f"{label}.{self._numbers[self.recorder.slot, label]}"

    def free(self, *tensors: Tensor) -> None:
        """Temporaries that go before the node's function returns."""
        for tensor in tensors:
            self._made.remove(tensor)
            self.recorder.release(tensor.storage)

    def workspace(self, name: str, shape: Shape, dtype: DType) -> list[Tensor]:
        """Allocate what a kernel needs for itself until the node's function returns, or until it is freed."""
        if not self.kernel_workspace:
            return []
        tensor = self.prepare(name, shape, dtype)
        tensor.storage.role = Role.WORKSPACE
        self.kernel(f"{name} (workspace)", [tensor])
        return [tensor]

    def kernel(self, name: str, outputs: Sequence[Tensor]) -> None:
        """Run one kernel that allocates all of `outputs` at once."""
        self.recorder.run(name, [t.storage for t in outputs])

    def like(self, name: str, tensor: Tensor, dtype: DType | None = None) -> Tensor:
        """Run an elementwise kernel whose result has the shape and layout of `tensor`."""
        return self.fresh(name, tensor.shape, dtype or tensor.dtype, tensor.memory)

    def overwritten(self, name: str, tensor: Tensor) -> Tensor:
        """A gradient that kernel `name` writes over `tensor`, which the node saved.

        The memory stays. Unless somebody else holds it (the caller's frame the logits), or another input of the node
        lies in it (halves of one row), it gets a name of backward's own, under which it outlives the next
        micro-batch's forward.
        """
        assert self._node is not None
        saved, early = self._found
        storage = (early or saved)[self.graph.uses(self._node).saves.index(tensor.storage)]
        together = sum(x.storage is tensor.storage for x in self._node.inputs) > 1
        if together or self.recorder.references(storage) > 1:
            self.recorder.run(name, [])
            return Tensor(storage, tensor.shape, tensor.memory, tensor.dtype)
        self._overwritten.append(storage)
        self.recorder.release(storage)
        return self.like(name, tensor)

    @staticmethod
    def view(gradient: Tensor, shape: Shape, memory: tuple[Dim, ...] | None = None) -> Tensor:
        """The same storage seen otherwise; it is never accumulated into (a view keeps its base alive)."""
        return Tensor(gradient.storage, shape, memory or gradient.memory, gradient.dtype, is_view=True)

    # the engine ----------------------------------------------------------------------------------------------------

    def _enter(self, op: Op, gradients: list[Tensor | None]) -> None:
        """`CheckpointFunction.backward` (torch/utils/checkpoint.py): all is run again, then its own backward begins."""
        region = self._checkpoints.nested(op)
        if region is None or self._inner is not None:
            return
        self._inner = Inner(region, [gradient.storage for gradient in gradients if gradient is not None])
        for storage in self._inner.received:
            self.recorder.retain(storage)
        self._checkpoints.recompute(region)

    def _leave(self, inner: Inner) -> None:
        """It returns the gradients of its arguments, which go on in the graph outside."""
        self._inner = None
        owned = [(tensor, self._owned(total)) for tensor, total in inner.totals.values()]
        saved = self._checkpoints.leave(inner.region)
        self._release(inner.received)
        self._release(saved)
        for tensor, total in owned:
            if tensor.producer is None:
                self._accumulate_grad(tensor.storage, total)
            else:
                self._send(total, tensor)

    def _evaluate(self, op: Op, gradients: list[Tensor | None]) -> None:
        recorder = self.recorder
        for runtime in self._runtimes:
            runtime.before_node(op)
        recorder.module, recorder.slot = op.module, op.place
        self._node = op
        saved, early = self._found = self._saved(op)
        assert op.backward is not None
        if op.fused:
            saved, early = [*saved, *early], []  # the kernel reads them when its results are written
        self._fusing = op.fused
        results: list[Tensor | None] = []
        seen = self._seen(op)
        for gradient, tensor in zip(op.backward(self, seen, gradients), seen.inputs, strict=True):
            wanted = gradient is not None and tensor.requires_grad
            results.append(gradient if wanted else None)
            if gradient is not None and wanted:
                recorder.retain(gradient.storage)
        if self._overwritten:
            saved, early = ([s for s in kept if s not in self._overwritten] for kept in (saved, early))
            self._overwritten.clear()
        self._release_made()
        read, given = self._read(op, gradients)
        self._release([*early, *given])
        results = [g and self._validate(g, t) for g, t in zip(results, op.inputs, strict=True)]
        self._fusing = False
        if op.fused:
            self._kernels.hold_sources(results, [*read, *saved])
        self._release([*read, *saved])
        for gradient, tensor in zip(results, op.inputs, strict=True):
            if gradient is not None:
                self._send(self._written(op, gradient, tensor), tensor)

    @staticmethod
    def _read(op: Op, gradients: Sequence[Tensor | None]) -> tuple[list[Storage], list[Storage]]:
        """Gradients that the node has till its end, and those that a function in Python has till it returns."""
        read = [gradient.storage for gradient in gradients if gradient is not None]
        return ([], read) if op.attributes.get("in_python") else (read, [])

    def _seen(self, op: Op) -> Op:
        """`op` as its rule sees it: inputs whose gradients nobody asks for require none."""
        return op

    def _saved(self, op: Op) -> tuple[list[Storage], list[Storage]]:
        """What goes when the node of `op` has run: afterwards, and as soon as its function returns."""
        return self._checkpoints.saved(op)

    def _written(self, op: Op, gradient: Tensor, tensor: Tensor) -> Tensor:
        """The `gradient` of `tensor` in memory, where something else than a fused kernel wants it."""
        if self._kernels.stays(op, gradient, tensor):
            return gradient
        place = None if tensor.is_parameter else self._kernels.in_place(gradient)  # a weight's outlives this backward
        return place or self._replace(gradient, self.like("fused_backward", gradient))

    def _release_made(self) -> None:
        """The node's function returns: its temporaries go."""
        for made in self._made:
            self.recorder.release(made.storage)
        self._made.clear()

    def _release(self, storages: Sequence[Storage]) -> None:
        for storage in storages:
            self.recorder.release(storage)

    def _validate(self, gradient: Tensor, tensor: Tensor) -> Tensor:
        """Bring a gradient to the shape and dtype of the tensor it belongs to (engine.cpp `validate_outputs`)."""
        if gradient.shape != tensor.shape and is_broadcast(gradient, tensor):
            gradient = self._replace(gradient, self.fresh("sum.dim_IntList", tensor.shape, gradient.dtype))
        if gradient.dtype is not tensor.dtype and gradient.dtype != tensor.dtype:
            gradient = self._replace(gradient, self.like("_to_copy.default", gradient, tensor.dtype))
        return gradient

    def _replace(self, old: Tensor, new: Tensor) -> Tensor:
        self._made.clear()
        self.recorder.release(old.storage)
        return new

    def _send(self, gradient: Tensor, tensor: Tensor) -> None:
        if self._inner is not None and self._is_argument(tensor, self._inner.region):
            _, old = self._inner.totals.get(tensor.storage, (tensor, None))
            self._inner.totals[tensor.storage] = tensor, self._accumulate(old, gradient)
            return
        if tensor.producer is None:
            self._send_to_leaf(gradient, tensor)
            return
        maker = self.graph.ops[tensor.producer]
        fused = maker.fused and maker.slot == self.recorder.slot
        width = len(maker.outputs)
        buffers = self._pending.setdefault(tensor.producer, [None] * width)
        buffers[tensor.output_index] = self._accumulate(buffers[tensor.output_index], gradient, fused=fused)

    @staticmethod
    def _is_argument(tensor: Tensor, region: Region) -> bool:
        outside = tensor.producer is None or tensor.producer < region.first
        return outside and not tensor.storage.persistent

    def _accumulate(self, old: Tensor | None, new: Tensor, *, fused: bool = False) -> Tensor:
        """Fan-in: in place when the buffer holds the only reference to `old` and it is no view."""
        if old is None:
            return new
        if fused:
            return self._kernels.total(self._label("add(engine)"), old, new)
        if not old.is_view and self.recorder.references(old.storage) == 1:
            self.recorder.run("add_(engine)", [])
            self.recorder.release(new.storage)
            return old
        result = self.like("add(engine)", old)
        self._made.clear()
        self.recorder.release(old.storage)
        self.recorder.release(new.storage)
        return result

    def _count_leaf_uses(self) -> dict[Storage, int]:
        uses: dict[Storage, int] = {}
        for op in self.graph.ops:
            if op.backward is not None:
                for tensor in op.inputs:
                    if tensor.is_parameter:
                        uses[tensor.storage] = uses.get(tensor.storage, 0) + 1
        return uses

    def _send_to_leaf(self, gradient: Tensor, leaf: Tensor) -> None:
        parameter = leaf.storage
        old = self._leaves.pop(parameter, None)
        moved = self._same_placement(old, gradient)
        total = self._accumulate(old, gradient)
        for tensor in moved:
            self.recorder.release(tensor.storage)
        self._expected[parameter] -= 1
        if self._expected[parameter]:
            self._leaves[parameter] = total
        else:
            self._accumulate_grad(parameter, total)

    def _same_placement(self, old: Tensor | None, new: Tensor) -> list[Tensor]:
        """A chunk of the whole gradient where the other is a shard: DTensor adds what has one placement only."""
        if old is None or sorted(map(str, old.dims)) == sorted(map(str, new.dims)):
            return []
        chunk = self.like("clone.default", old)
        self._made.clear()
        return [chunk]

    def _accumulate_grad(self, parameter: Storage, gradient: Tensor) -> None:
        """`AccumulateGrad`: steal the first gradient if nobody else holds it, add later ones in place."""
        if parameter in self.gradients:
            self.recorder.run("add_(grad)", [])
            self.recorder.release(gradient.storage)
        else:
            self._keep_gradient(parameter, gradient)
        if parameter.role is not Role.RECEIVED:  # no framework wraps what another stage sent
            for runtime in self._runtimes:
                runtime.accumulated(parameter)

    def _keep_gradient(self, parameter: Storage, gradient: Tensor) -> None:
        gradient = gradient if self._weights_are_views else self._owned(gradient)
        if parameter.role is Role.RECEIVED:  # it is sent to the stage before
            self.kept.append(gradient.storage)
            return
        gradient.storage.role = Role.GRADIENT
        if parameter.persistent:
            self.gradients[parameter] = gradient.storage
        else:
            self.kept.append(gradient.storage)

    def _owned(self, gradient: Tensor) -> Tensor:
        """What becomes `.grad`: the gradient itself where nobody else holds it, else a copy."""
        if self.recorder.references(gradient.storage) == 1:
            return gradient
        copy = self.like("clone(grad)", gradient)
        self._made.clear()
        self.recorder.release(gradient.storage)
        return copy
