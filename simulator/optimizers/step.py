"""What an optimizer's step is written with: states that stay, temporaries that go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from hardware.dtypes import DType
from simulator.graph import Storage, make_storage
from simulator.recorder import Step
from simulator.roles import Phase, Role
from simulator.sizes import Dim
from simulator.workload import Optimizer


@attrs.frozen(eq=False)
class Parameter:
    """A trainable weight with its gradient; `shape` is that of the weight, an axis may be several dimensions."""

    storage: Storage
    gradient: Storage
    shape: tuple[tuple[Dim, ...], ...]

    @property
    def dims(self) -> tuple[Dim, ...]:
        """All dimensions of the weight."""
        return tuple(d for axis in self.shape for d in axis)

    @property
    def dtype(self) -> DType:
        """Element type of the weight."""
        return self.storage.dtype


class OptimizerStep:
    """Records one optimizer step.

    Args:
        optimizer: the options.
        parameters: trainable weights in the order of ``model.parameters()``.
        states: what earlier steps left, by parameter and name; a cold step starts with none and fills it.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Parameter], states: dict[tuple[Storage, str], Storage]
    ) -> None:
        self.optimizer = optimizer
        self.parameters = parameters
        self.steps: list[Step] = []
        self._states = states
        self._serial = 0

    def state(self, parameter: Parameter, name: str, dims: Iterable[Dim], dtype: DType, op: str) -> None:
        """Make state `name` of `parameter` with kernel `op`, unless an earlier step made it."""
        key = (parameter.storage, name)
        if key not in self._states:
            label = f"{parameter.storage.label}.{name}"
            made = make_storage(label, tuple(dims), dtype, Role.OPTIMIZER_STATE, parameter.storage.slot)
            self._states[key] = made
            self._record(op, parameter.storage.slot, [made])

    def temporary(self, parameter: Parameter, op: str, dims: Iterable[Dim], dtype: DType) -> Storage:
        """Run kernel `op`, which allocates a temporary for `parameter`; free it with `free`."""
        self._serial += 1
        label = f"{parameter.storage.label}.{op}"
        made = make_storage(label, tuple(dims), dtype, Role.OPTIMIZER, parameter.storage.slot)
        self._record(op, parameter.storage.slot, [made])
        return made

    def temporaries(self, op: str) -> list[Storage]:
        """A foreach kernel that allocates one temporary like every parameter at once."""
        return [self.temporary(p, op, p.dims, p.dtype) for p in self.parameters]

    def free(self, storages: Iterable[Storage]) -> None:
        """Let temporaries (or gradients) go."""
        for storage in storages:
            last = self.steps[-1] if self.steps else None
            if last is None or last.slot != storage.slot or (last.deaths and last.births):
                self._record("free", storage.slot, [])
            self.steps[-1].deaths.append(storage)

    def _record(self, op: str, slot: int | None, births: list[Storage]) -> None:
        self.steps.append(Step(op, Phase.OPTIMIZER, "optimizer", slot, births))
