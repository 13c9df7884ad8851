"""Wrapped modules: the groups of weights that a framework gathers and reduces together, entered and left by hooks.

Sources: torch/distributed/fsdp/_fully_shard/_fsdp_state.py `_pre_forward`, `_post_forward`, `_pre_backward`,
`_root_post_backward_final_callback`; torch/distributed/fsdp/_runtime_utils.py for FSDP1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import attrs

from hardware.errors import UnsupportedError
from simulator.graph import ForwardGraph, Op, Tensor
from simulator.runtime import Job, Runtime, Turn


@attrs.frozen(eq=False)
class Unit:
    """Weights that are gathered together when their module is entered.

    Attributes:
        name: part of the labels of its buffers.
        slot: the built layer it is; None outside the layers.
        parameters: in the order of ``module.parameters()``.
        modules: dotted paths of the modules outside the layers that enter it; empty for the root.
    """

    name: str
    slot: int | None
    parameters: tuple[Tensor, ...]
    modules: tuple[str, ...] = ()

    @property
    def is_root(self) -> bool:
        """Whether it is entered by the model itself."""
        return self.slot is None and not self.modules

    def owns(self, op: Op) -> bool:
        """Whether `op` runs inside its module."""
        if self.slot is not None:
            return op.slot == self.slot
        return any(op.module == module or op.module.startswith(f"{module}.") for module in self.modules)


#: The unit whose inputs are token ids.
EMBEDDING = "embedding"
#: What is wrapped, besides the model itself: nothing, each layer, or each layer and the modules around them.
WRAPS = ("root", "layer", "layer+embedding+head")


def wrapped_units(graph: ForwardGraph, wrap: str) -> list[Unit]:
    """The units of wrapping policy `wrap`, root first, then in forward order.

    ``layer+embedding+head`` wraps the embedding and, as one unit, final norm and head, as torchtitan does
    (torchtitan/models/llama3/infra/parallelize.py `apply_fsdp`).

    Raises:
        UnsupportedError: a tied weight would belong to two units.
    """
    outside = [tensor for tensor in graph.parameters if tensor.storage.slot is None]
    if wrap == "root":
        return [Unit("root", None, tuple(graph.parameters))]
    layers = _layer_units(graph)
    if wrap == "layer":
        return [Unit("root", None, tuple(outside)), *layers]
    before, after = _around_layers(graph, outside)
    return [Unit("root", None, ()), _outer_unit(EMBEDDING, before), *layers, _outer_unit("head", after)]


def _layer_units(graph: ForwardGraph) -> list[Unit]:
    by_slot: dict[int, list[Tensor]] = {}
    for tensor in graph.parameters:
        if tensor.storage.slot is not None:
            by_slot.setdefault(tensor.storage.slot, []).append(tensor)
    return [Unit("layer", slot, tuple(tensors)) for slot, tensors in sorted(by_slot.items())]


def _around_layers(graph: ForwardGraph, outside: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Weights of the modules before the layers, and of those after them."""
    first_layer = next((i for i, op in enumerate(graph.ops) if op.slot is not None), len(graph.ops))
    early, late = (_read_by(part) for part in (graph.ops[:first_layer], graph.ops[first_layer:]))
    shared = [tensor.storage.label for tensor in outside if tensor.storage in early and tensor.storage in late]
    if shared:
        raise UnsupportedError(
            f"'wrap' must be layer or root where a weight is tied: {shared[0]} would belong to two units, "
            "which fully_shard refuses"
        )
    return [t for t in outside if t.storage in early], [t for t in outside if t.storage not in early]


def _read_by(ops: Iterable[Op]) -> set[object]:
    return {tensor.storage for op in ops for tensor in op.inputs}


def _outer_unit(name: str, tensors: Sequence[Tensor]) -> Unit:
    paths = dict.fromkeys(tensor.storage.label.rpartition(".")[0] for tensor in tensors)
    return Unit(name, None, tuple(tensors), tuple(paths))


class UnitRuntime(Runtime):
    """A runtime that enters and leaves units; the root is entered first and left last."""

    def __init__(self, job: Job, units: Sequence[Unit]) -> None:
        super().__init__(job)
        self.units = tuple(units)
        self._root = next((unit for unit in units if unit.is_root), None)
        self._by_slot = {unit.slot: unit for unit in units if unit.slot is not None}
        self._outer = tuple(unit for unit in units if unit.modules)
        graph = job.graph
        self._outside = frozenset(() if graph.outside is None else graph.ops[graph.outside :])
        self._current: Unit | None = None
        self._in_model = False

    # what frameworks override --------------------------------------------------------------------------------------

    def pre_forward(self, unit: Unit) -> None:
        """The unit's module is called."""

    def post_forward(self, unit: Unit) -> None:
        """The unit's module returns."""

    def pre_backward(self, unit: Unit) -> None:
        """The gradient of the unit's output is there."""

    def post_backward(self, unit: Unit) -> None:
        """The gradients of the unit's inputs and weights are there."""

    # where that is -------------------------------------------------------------------------------------------------

    def begin_forward(self, turn: Turn) -> None:
        """The root is entered."""
        self._current = None
        if self._root is not None:
            self._at(self._root, self.pre_forward)

    def before_op(self, op: Op) -> None:
        """Leave one unit and enter another where `op` runs in another one than the op before it."""
        unit = self._unit_of(op)
        if unit is not self._current:
            self._leave(self.post_forward)
            self._current = unit
            if unit is not None:
                self._at(unit, self.pre_forward)

    def end_forward(self) -> None:
        """The root is left."""
        self._leave(self.post_forward)
        if self._root is not None:
            self._at(self._root, self.post_forward)

    def begin_backward(self, turn: Turn) -> None:
        """Nothing yet: a hook on the model's output tells when its backward begins."""
        self._in_model = False

    def before_node(self, op: Op) -> None:
        """As `before_op`, against the order of forward; ops outside the model belong to nobody."""
        if not self._in_model:
            if op in self._outside:
                return
            self._in_model = True
            if self._root is not None:
                self._at(self._root, self.pre_backward)
        unit = self._unit_of(op)
        if unit is not self._current:
            self._leave(self.post_backward)
            self._current = unit
            if unit is not None:
                self._at(unit, self.pre_backward)

    def end_backward(self) -> None:
        """Units whose inputs need no gradient, the root among them, are left by a final callback: root first."""
        last, self._current = self._current, None
        early = [unit for unit in self.units if unit.is_root or unit is last or self._without_input_gradient(unit)]
        for unit in early:
            self._at(unit, self.post_backward)

    def _leave(self, act: Callable[[Unit], None]) -> None:
        left, self._current = self._current, None
        if left is not None and not (act == self.post_backward and self._without_input_gradient(left)):
            self._at(left, act)

    def _at(self, unit: Unit, act: Callable[[Unit], None]) -> None:
        """Run `act` so that its steps belong to the unit's layer."""
        recorder = self.job.recorder
        recorder.module, recorder.slot = unit.name, unit.slot
        act(unit)

    @staticmethod
    def _without_input_gradient(unit: Unit) -> bool:
        """Token ids have no gradient, so no autograd node marks the end of the embedding's backward."""
        return unit.name == EMBEDDING

    def _unit_of(self, op: Op) -> Unit | None:
        if op.slot is not None:
            return self._by_slot.get(op.slot)
        return next((unit for unit in self._outer if unit.owns(op)), None)
