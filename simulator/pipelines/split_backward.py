"""Backward in two parts: gradients of what a stage received first, those of its weights some time later.

Source: torch 2.13 torch/distributed/pipelining/_backward.py `stage_backward_input`, `stage_backward_weight`.
Technique: Qi et al., Zero Bubble Pipeline Parallelism, arXiv:2401.10241.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs

from hardware.errors import UnsupportedError
from simulator.autograd import Autograd
from simulator.graph import ForwardGraph, Op, StageGraph, Storage, Tensor


class Split:
    """Which nodes of a stage either part of its backward needs.

    Attributes:
        groups: nodes on the way from the output to what was received that lead to weights as well
            (`get_param_groups`), in the order of ``parameters()``: the second part begins at each of them.
    """

    def __init__(self, graph: ForwardGraph, stage: StageGraph) -> None:
        self._graph = graph
        self._indices = range(stage.first_op, stage.end_op)
        self._on_the_way = {id(stage.received)}
        for op in self.ops:
            if op.backward is not None and any(self.leads_to_input(tensor) for tensor in op.inputs):
                self._on_the_way.update(map(id, op.outputs))
        order = {tensor.storage: number for number, tensor in enumerate(graph.parameters)}
        first = {op: self._first_weight(op, order) for op in self.ops if self._meets_weights(op)}
        self.groups = sorted(first, key=first.__getitem__)

    @property
    def ops(self) -> list[Op]:
        """The stage's ops."""
        return [self._graph.ops[index] for index in self._indices]

    def leads_to_input(self, tensor: Tensor) -> bool:
        """Whether the gradient of `tensor` goes on to what the stage received."""
        return id(tensor) in self._on_the_way

    def _meets_weights(self, op: Op) -> bool:
        wanted = [self.leads_to_input(t) for t in op.inputs if t.requires_grad]
        return op.backward is not None and any(wanted) and not all(wanted)

    def _first_weight(self, op: Op, order: dict[Storage, int]) -> int:
        """The first in `order` of the weights whose gradients come from `op` without another such node between."""
        pending = [t for t in op.inputs if t.requires_grad and not self.leads_to_input(t)]
        found = []
        while pending:
            tensor = pending.pop()
            if tensor.producer is None:
                found.append(order[tensor.storage])
            else:
                pending += [t for t in self._graph.ops[tensor.producer].inputs if t.requires_grad]
        return min(found)

    def below(self, tops: list[Op]) -> set[Op]:
        """The nodes that are there as long as one of `tops` is: those that it leads to."""
        pending, found = list(tops), set(tops)
        while pending:
            for tensor in pending.pop().inputs:
                maker = None if tensor.producer is None else self._graph.ops[tensor.producer]
                if maker is not None and maker not in found:
                    found.add(maker)
                    pending.append(maker)
        return found


class _PartialBackward(Autograd):
    """A backward that computes some of the gradients of a node's inputs only (`task_should_compute_output`)."""

    def __init__(self, split: Split, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._split = split

    def _seen(self, op: Op) -> Op:
        inputs = [t if self._wants(t) else attrs.evolve(t, requires_grad=False) for t in op.inputs]
        return attrs.evolve(op, inputs=tuple(inputs))

    def _wants(self, tensor: Tensor) -> bool:
        raise NotImplementedError

    def release_saved(self, nodes: Iterable[Op]) -> None:
        """Nodes that nobody refers to any more are freed, with what they saved."""
        for op in nodes:
            self._release(self.graph.uses(op).saves)


class InputBackward(_PartialBackward):
    """`stage_backward_input`: the graph stays, and hooks keep the gradients that enter the nodes of `Split.groups`."""

    def __init__(self, split: Split, *arguments: Any, **options: Any) -> None:
        super().__init__(split, *arguments, **options)
        self._tag = "input_grad"  # whatever gradients of weights there are: both parts call theirs the same
        self.captured: dict[Op, list[Tensor | None]] = {}

    def _wants(self, tensor: Tensor) -> bool:
        return self._split.leads_to_input(tensor)

    def _saved(self, _: Op) -> tuple[list[Storage], list[Storage]]:
        return [], []

    def overwritten(self, name: str, _: Tensor) -> Tensor:
        """Refused: what is written over is needed again for the weights."""
        raise UnsupportedError(f"a backward split in two with {name}, which works in place, is not modelled")

    def _evaluate(self, op: Op, gradients: list[Tensor | None]) -> None:
        if op in self._split.groups:
            self.captured[op] = gradients
            for gradient in gradients:
                if gradient is not None:
                    self.recorder.retain(gradient.storage)
        super()._evaluate(op, gradients)

    def finish(self) -> None:
        """The outputs are detached: nodes above all that the second part begins at go."""
        needed = self._split.below(self._split.groups)
        self.recorder.slot = None
        self.recorder.note("detach_")
        self.release_saved([op for op in self._split.ops if op not in needed])


class WeightBackward(_PartialBackward):
    """`stage_backward_weight`: one backward for each of `Split.groups`, from the gradients that the hooks kept."""

    def __init__(self, split: Split, *arguments: Any, **options: Any) -> None:
        super().__init__(split, *arguments, **options)
        self._tag = f"weight_{self._tag}"
        self._returned: list[Storage] = []
        """What `autograd.grad` returned last: a variable keeps it until it returns again."""
        self._ran: set[Op] = set()

    def _wants(self, tensor: Tensor) -> bool:
        return tensor.requires_grad and not self._split.leads_to_input(tensor)

    def run_groups(self, captured: dict[Op, list[Tensor | None]]) -> None:
        """Backward from each node to its weights; a node goes with the last above it that waits for its turn."""
        groups = self._split.groups
        there = self._split.below(groups)
        for number, op in enumerate(groups):
            needed = self._split.below(groups[number:])
            self.release_saved([node for node in self._split.ops if node in there - needed - self._ran])
            there = needed
            self._run_group(op, captured[op])
        self.recorder.slot = None
        self.recorder.note("free")
        self.release_saved([node for node in self._split.ops if node in there - self._ran])
        self._release(self._returned)

    def _run_group(self, op: Op, gradients: list[Tensor | None]) -> None:
        before, self._returned = self._returned, []
        self._evaluate(op, gradients)
        while self._pending:
            index = max(self._pending)
            self._evaluate(self.graph.ops[index], self._pending.pop(index))
        self._release(before)

    def _evaluate(self, op: Op, gradients: list[Tensor | None]) -> None:
        super()._evaluate(op, gradients)
        self._ran.add(op)

    def _accumulate_grad(self, parameter: Storage, gradient: Tensor) -> None:
        if parameter in self.gradients:
            self.recorder.retain(gradient.storage)
            self._returned.append(gradient.storage)
        super()._accumulate_grad(parameter, gradient)
