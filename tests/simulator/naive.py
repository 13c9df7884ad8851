"""A deliberately naive interpreter: every storage is a Python object, every reference a Python reference.

It runs the forward graph of a model with all layers built, op by op, and backward node by node, and lets
CPython's own reference counts decide what is alive. It shares the op library with the simulator (what an op
allocates and saves) and nothing else: no recorder, no layout, no tree, no folding.
"""

from __future__ import annotations

import sys
import weakref

from simulator.autograd import is_broadcast
from simulator.graph import Op, Shape, Storage, Tensor, flat, make_storage, make_tensor
from simulator.plan import Plan
from simulator.roles import Role


class Cell:
    """Stands for one allocation; it is alive while Python can reach it."""


class Memory:
    """Bytes of the cells alive now, and the bytes after each op that allocated."""

    def __init__(self, bindings):
        self.bindings = bindings
        self.live = 0
        self.trace = []

    def allocate(self, storages):
        cells = []
        for storage in storages:
            cell, nbytes = Cell(), int(storage.size.allocated(self.bindings))
            self.live += nbytes
            weakref.finalize(cell, self._free, nbytes)
            cells.append(cell)
        if storages:
            self.trace.append(self.live)
        return cells

    def _free(self, nbytes):
        self.live -= nbytes


class Gradient:
    """A gradient tensor and the cell it keeps."""

    def __init__(self, tensor, cell):
        self.tensor, self.cell = tensor, cell


class Engine:
    """What backward rules talk to."""

    def __init__(self, memory, kernel_workspace):
        self.memory, self.kernel_workspace = memory, kernel_workspace
        self.cells = {}
        self.saved = {}
        self.node = None

    def prepare(self, name, shape: Shape, dtype, memory=None):
        tensor = make_tensor(make_storage(name, flat(shape), dtype, Role.BACKWARD), shape, dtype)
        tensor.memory = memory or tensor.memory
        return tensor

    def kernel(self, name, outputs):
        for tensor, cell in zip(outputs, self.memory.allocate([t.storage for t in outputs]), strict=True):
            self.cells[tensor.storage] = cell

    def fresh(self, name, shape, dtype, memory=None):
        tensor = self.prepare(name, shape, dtype, memory)
        self.kernel(name, [tensor])
        return tensor

    def like(self, name, tensor, dtype=None):
        return self.fresh(name, tensor.shape, dtype or tensor.dtype, tensor.memory)

    def workspace(self, name, shape, dtype):
        return [self.fresh(name, shape, dtype)] if self.kernel_workspace else []

    def free(self, *tensors):
        for tensor in tensors:
            del self.cells[tensor.storage]

    def overwritten(self, name, tensor):
        """The gradient is in the memory of a saved tensor, and has a name of its own unless another holds that."""
        gradient = self.prepare(name, tensor.shape, tensor.dtype, tensor.memory)
        cell = self.cells[gradient.storage] = self.saved[tensor.storage]
        together = sum(x.storage is tensor.storage for x in self.node.inputs) > 1
        if not together and sys.getrefcount(cell) == 4:  # `cell`, its places in both, and the argument itself
            self.memory.trace.append(self.memory.live)
        return gradient

    @staticmethod
    def view(gradient, shape, memory=None):
        return Tensor(gradient.storage, shape, memory or gradient.memory, gradient.dtype, is_view=True)


class NaiveMicroBatches:
    """Runs micro-batch after micro-batch of a plan without checkpointing."""

    def __init__(self, plan: Plan):
        self.graph, self.training = plan.graph, plan.training
        self.memory = Memory(plan.dimensions.bindings)
        self.gradients: dict[Storage, Cell] = {}
        leaves = [t.storage for t in (*self.graph.parameters, *self.graph.buffers)]
        self.leaves = dict(zip(leaves, self.memory.allocate(leaves), strict=True))
        self.memory.trace.clear()

    def run(self):
        """One micro-batch; returns live bytes after every allocating op."""
        start = len(self.memory.trace)
        batch = {}
        for tensor in self.graph.inputs:
            (batch[tensor.storage],) = self.memory.allocate([tensor.storage])
        saved, kept = self._forward({**self.leaves, **batch})
        self._backward(saved, kept)
        return self.memory.trace[start:]

    def _forward(self, cells):
        """Forward: a cell is dropped from `cells` after the last op that reads or holds it."""
        last = {}
        for position, op in enumerate(self.graph.ops):
            for storage, edge in self.graph.edges.pred[op].items():
                if "reads" in edge or "holds" in edge:
                    last[storage] = position
        saved = {}
        wanted = {t.storage for t in self.graph.outputs} | {self.graph.loss.storage}
        for position, op in enumerate(self.graph.ops):
            births = list(self.graph.edges.succ[op])
            cells.update(zip(births, self.memory.allocate(births), strict=True))
            saved[op] = {s: cells[s] for s, edge in self.graph.edges.pred[op].items() if "saves" in edge}
            for storage in [s for s in cells if last.get(s, -1) <= position and s not in wanted]:
                if storage not in self.leaves:
                    del cells[storage]
        keep = wanted if self.training.keep_outputs else {self.graph.loss.storage}
        return saved, {s: cells[s] for s in keep}

    def _backward(self, saved, kept):
        loss = self.graph.loss
        engine = Engine(self.memory, self.training.kernel_workspace)
        seed = engine.fresh("seed", loss.shape, loss.dtype)
        root = Gradient(seed, engine.cells.pop(seed.storage))
        buffers = {(loss.producer, 0): Gradient(seed, root.cell)}
        pending = self._leaf_uses()
        for index, op in reversed(list(enumerate(self.graph.ops))):
            keys = [(index, i) for i in range(len(op.outputs))]
            incoming = [buffers.pop(key, None) for key in keys]
            if any(g is not None for g in incoming):
                engine.node, engine.saved = op, saved.pop(op)
                outgoing = self._node(engine, op, incoming)
                engine.saved = {}
                incoming = None
                self._deliver(op, outgoing, buffers, pending, engine)
                outgoing = None

    def _node(self, engine, op: Op, incoming):
        engine.cells = {g.tensor.storage: g.cell for g in incoming if g is not None}
        results = op.backward(engine, op, [g and g.tensor for g in incoming])
        results = [g if t.requires_grad else None for g, t in zip(results, op.inputs, strict=True)]
        keep = {g.storage for g in results if g is not None} | {g.tensor.storage for g in incoming if g is not None}
        engine.cells = {s: c for s, c in engine.cells.items() if s in keep}
        outgoing = []
        for index, tensor in enumerate(op.inputs):
            gradient = results[index]
            if gradient is not None:
                gradient = self._validated(engine, gradient, tensor, results[index + 1 :], outgoing, incoming)
                outgoing.append(Gradient(gradient, engine.cells[gradient.storage]))
            else:
                outgoing.append(None)
        engine.cells = {}
        return outgoing

    @staticmethod
    def _validated(engine, gradient, tensor, rest, done, incoming):
        held = {g.storage for g in rest if g is not None}
        held |= {g.tensor.storage for g in (*done, *incoming) if g is not None}
        for needed, make in (
            (is_broadcast(gradient, tensor), lambda g: engine.fresh("sum", tensor.shape, g.dtype)),
            (gradient.dtype != tensor.dtype, lambda g: engine.like("cast", g, tensor.dtype)),
        ):
            if needed:
                old, gradient = gradient, make(gradient)
                if old.storage not in held:
                    del engine.cells[old.storage]
        return gradient

    def _deliver(self, op: Op, outgoing, buffers, pending, engine):
        for index, tensor in enumerate(op.inputs):
            gradient, outgoing[index] = outgoing[index], None
            if gradient is None:
                continue
            leaf = tensor.producer is None
            key = tensor.storage if leaf else (tensor.producer, tensor.output_index)
            old = buffers.pop(key, None)
            buffers[key] = gradient if old is None else self._sum(engine, old, gradient)
            old = gradient = None
            if leaf:
                pending[key] -= 1
                if not pending[key]:
                    self._into_parameter(tensor.storage, buffers.pop(key))

    @staticmethod
    def _sum(engine, old, new):
        """In place when the buffer holds the only reference to `old`; counts Python's own references."""
        only = sys.getrefcount(old.cell) == 2 and not old.tensor.is_view  # `old.cell` and the argument itself
        if only:
            return old
        result = engine.like("add", old.tensor)
        return Gradient(result, engine.cells.pop(result.storage))

    def _into_parameter(self, parameter, gradient):
        if parameter not in self.gradients:
            self.gradients[parameter] = gradient.cell

    def _leaf_uses(self):
        uses = {}
        for op in self.graph.ops:
            for tensor in op.inputs if op.backward is not None else ():
                if tensor.is_parameter:
                    uses[tensor.storage] = uses.get(tensor.storage, 0) + 1
        return uses
