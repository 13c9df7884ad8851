"""What an optimizer's step is written with: states that stay, temporaries that go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from hardware.dtypes import DType
from simulator.graph import Storage, flat, make_storage
from simulator.optimizers.parameter import Parameter as Parameter
from simulator.recorder import Step
from simulator.roles import Phase, Role
from simulator.sizes import Dim, Dimensions, ceil_div, product
from simulator.workload import Optimizer


@attrs.frozen(kw_only=True)
class Surroundings:
    """What an optimizer may have to know of the run besides its weights."""

    tensors: str
    """Name of the dimension that counts the trainable tensors of the whole model."""
    dimensions: Dimensions
    """The dimension table, for states and temporaries whose size is derived from a weight's."""
    heads: int = 1
    """Attention heads, for optimizers that treat heads apart."""
    kernel_workspace: bool = True
    """Whether to count what kernels allocate for themselves."""


class OptimizerStep:
    """Records one optimizer step.

    Args:
        optimizer: the options.
        parameters: the weights to update, in the order of ``model.parameters()``.
        states: what earlier steps left, by parameter and name; a cold step starts with none and fills it.
        surroundings: what else there is.
        held: all that have a gradient on this rank, if those are more than it updates.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Sequence[Parameter],
        states: dict[tuple[Storage, str], Storage],
        surroundings: Surroundings,
        held: Sequence[Parameter] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.held = parameters if held is None else held
        self.tensors = surroundings.tensors
        self.steps: list[Step] = []
        self.constructed: list[Storage] = []
        """States that the optimizer's constructor makes, before the first micro-batch."""
        self.surroundings = surroundings
        self._dimensions = surroundings.dimensions
        self._states = states
        self._locals: dict[str, Storage] = {}

    @property
    def gradients(self) -> list[Storage]:
        """The gradients that ``zero_grad`` frees: each storage once, and none that a framework keeps for ever."""
        found = dict.fromkeys(parameter.gradient for parameter in self.held)
        return [storage for storage in found if not storage.persistent]

    def allocate(self, op: str, storage: Storage) -> None:
        """Run kernel or call `op`, which allocates a framework's `storage`; free it with `free`."""
        self._record(op, storage.slot, [storage])

    def groups(self) -> list[OptimizerStep]:
        """One step per parameter group; no kernel takes DTensors and plain tensors together."""
        kinds = sorted({(p.group, not p.distributed) for p in self.parameters})
        if len(kinds) < 2:
            return [self]
        parts = [[p for p in self.parameters if (p.group, not p.distributed) == kind] for kind in kinds]
        return [self.part(part, self.optimizer) for part in parts]

    def part(self, parameters: Sequence[Parameter], optimizer: Optimizer) -> OptimizerStep:
        """What `optimizer` does with some of the parameters, recorded here."""
        step = OptimizerStep(optimizer, parameters, self._states, self.surroundings)
        step.steps, step.constructed = self.steps, self.constructed
        return step

    def count(self, dims: Iterable[Dim]) -> int:
        """Elements of a tensor with dimensions `dims`, for rules that depend on a weight's size."""
        return int(product(dims, self._dimensions.bindings))

    def dimension(self, name: str, value: int) -> Dim:
        """A dimension of `value`, called `name` as far as that is free."""
        return self._dimensions.bind(name, value)

    def parts(self, dims: Iterable[Dim], elements: int) -> Dim:
        """The dimension that counts the parts of `elements` each, the last one maybe not full, of a tensor."""
        named = tuple(dims)
        name = f"parts of {elements} in {'*'.join(map(str, named)) or 1}"
        return self._dimensions.bind(name, ceil_div(product(named, self._dimensions.bindings), elements))

    def sides(self, parameter: Parameter) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
        """Dimensions of the rows and of the columns of a matrix."""
        return flat(parameter.shape[:1]), flat(parameter.shape[1:])

    def read_gradients(self, times: int = 1, parameters: Iterable[Parameter] | None = None) -> None:
        """Run a kernel that has the gradients among its arguments, `times` over.

        Those of another placement than their weights are redistributed for as long
        (torch/distributed/tensor/_dispatch.py).
        """
        among = self.parameters if parameters is None else parameters
        moved = [(p, p.redistribution, i) for i in range(times) for p in among if p.redistribution is not None]
        self.free([self.like(parameter, kernel, f"redistributed.{i}") for parameter, kernel, i in moved])

    def state(self, parameter: Parameter, name: str, dims: Iterable[Dim], dtype: DType, op: str) -> None:
        """Make state `name` of `parameter` with kernel `op`, unless an earlier step made it."""
        key = (parameter.storage, name)
        if key not in self._states:
            label = f"{parameter.storage.label}.{name}"
            made = make_storage(label, tuple(dims), dtype, Role.OPTIMIZER_STATE, parameter.storage.slot)
            self._states[key] = made
            self._record(op, parameter.storage.slot, [made])

    def has_state(self, parameter: Parameter, name: str) -> bool:
        """Whether an earlier step made state `name` of `parameter`."""
        return (parameter.storage, name) in self._states

    def shared_state(self, name: str, dims: Iterable[Dim], dtype: DType, op: str) -> None:
        """Make a state that all parameters share with kernel `op`, unless an earlier step made it."""
        first = self.parameters[0].storage
        owner, slot = (first.label, first.slot) if len(self.parameters) == 1 else ("optimizer", None)
        if (first, name) not in self._states:
            made = make_storage(f"{owner}.{name}", tuple(dims), dtype, Role.OPTIMIZER_STATE, slot)
            self._states[first, name] = made
            self._record(op, slot, [made])

    def constructed_state(self, parameter: Parameter, name: str, dims: Iterable[Dim], dtype: DType) -> None:
        """State `name` of `parameter` is made by the optimizer's constructor, as loading is."""
        key = (parameter.storage, name)
        if key not in self._states:
            label = f"{parameter.storage.label}.{name}"
            made = make_storage(label, tuple(dims), dtype, Role.OPTIMIZER_STATE, parameter.storage.slot)
            self._states[key] = made
            self.constructed.append(made)

    def on_host(self, parameter: Parameter, name: str) -> None:
        """State `name` of `parameter` takes nothing on the device."""
        self._states.setdefault((parameter.storage, name), parameter.storage)

    def renewed_state(
        self, parameter: Parameter, name: str, dims: Iterable[Dim], dtype: DType, op: str
    ) -> list[Storage]:
        """Make state `name` of `parameter` anew with kernel `op`.

        Returns:
            What the caller has to free once the new one is stored. Old and new are alike, so that the one
            an earlier step made stays in the books and the other goes.
        """
        if (parameter.storage, name) in self._states:
            return [self.temporary(parameter, op, dims, dtype, f"{name} (new)")]
        self.state(parameter, name, dims, dtype, op)
        return []

    def temporary(
        self, parameter: Parameter, op: str, dims: Iterable[Dim], dtype: DType, name: str | None = None
    ) -> Storage:
        """Run kernel `op`, which allocates a temporary for `parameter`; free it with `free`.

        `name` tells apart temporaries of one kernel that live at the same time.
        """
        label = f"{parameter.storage.label}.{name or op}"
        made = make_storage(label, tuple(dims), dtype, Role.OPTIMIZER, parameter.storage.slot)
        self._record(op, parameter.storage.slot, [made])
        return made

    def workspace(self, parameter: Parameter, op: str, dims: Iterable[Dim], dtype: DType, name: str) -> list[Storage]:
        """What kernel `op` allocates for itself, unseen by the dispatcher, as far as that is counted."""
        if not self.surroundings.kernel_workspace:
            return []
        made = self.temporary(parameter, f"{op} (workspace)", dims, dtype, name)
        made.role = Role.WORKSPACE
        return [made]

    def like(self, parameter: Parameter, op: str, name: str | None = None) -> Storage:
        """A temporary with the shape and dtype of `parameter`."""
        return self.temporary(parameter, op, parameter.dims, parameter.dtype, name)

    def foreach(self, op: str, parameters: Iterable[Parameter] | None = None) -> list[Storage]:
        """A foreach kernel that allocates one temporary like every parameter at once."""
        return [self.like(p, op) for p in (self.parameters if parameters is None else parameters)]

    def local(self, name: str, storage: Storage | None) -> None:
        """Bind the Python local `name`: what it held before is freed now."""
        old = self._locals.pop(name, None)
        if storage is not None:
            self._locals[name] = storage
        if old is not None:
            self.free([old])

    def unbind(self, name: str) -> Storage:
        """Take the temporary out of local `name` without freeing it."""
        return self._locals.pop(name)

    def free(self, storages: Sequence[Storage]) -> None:
        """Let temporaries (or gradients) go, after the kernel that ran last.

        Those of several layers go in a step outside the layers: a step of one layer must not stand
        between two steps of another, or repeating the layer would change their order. So do those of a layer
        that is no neighbour of the one whose step ran last: an optimizer went back to the first layer.
        """
        if not storages:
            return
        slots = {storage.slot for storage in storages}
        if not self.steps or len(slots) > 1 or any(self._is_far(slot) for slot in slots):
            self._record("free", None, [])
        self.steps[-1].deaths.extend(storages)

    def _is_far(self, slot: int | None) -> bool:
        last = self.steps[-1].slot
        return slot is not None and last is not None and abs(slot - last) > 1

    def finish(self) -> None:
        """The function returns: its locals go."""
        for name in list(self._locals):
            self.local(name, None)

    def _record(self, op: str, slot: int | None, births: list[Storage]) -> None:
        self.steps.append(Step(op, Phase.OPTIMIZER, "optimizer", slot, births))
