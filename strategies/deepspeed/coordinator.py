"""When ZeRO-3 gathers and releases weights: DeepSpeed's coordinator, on ints, over the modules of the real model.

Source: DeepSpeed 0.19.8 deepspeed/runtime/zero/partitioned_param_coordinator.py (function named per method).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import attrs

from simulator.graph import ForwardGraph, Op, Storage
from simulator.sizes import Dim

#: Functions of a recipe's modules that are no modules themselves.
FUNCTIONS = ("loss_function",)
#: What the module of a layer is called in recipes.
LAYER = "layer"
#: One module on the way from the model down to an op; the layer tells equal names apart.
Step = tuple[str, int | None]


def path_of(op: Op) -> tuple[Step, ...]:
    """The modules that `op` runs in, outermost first."""
    module = op.module
    for tensor in op.inputs:
        owner = tensor.storage.label.rpartition(".")[0]
        if tensor.is_parameter and owner.startswith(f"{module}."):
            module = owner
    names = [name for name in module.split(".") if name and name not in FUNCTIONS]
    return tuple((name, op.slot) for name in names)


class Walk:
    """The modules that are being run: tells which are left and which are entered on the way to an op."""

    def __init__(self) -> None:
        self.stack: list[Step] = []

    def go(self, path: Sequence[Step]) -> tuple[list[tuple[Step, ...]], list[tuple[Step, ...]]]:
        """The modules left, innermost first, and entered, outermost first, each by its whole path."""
        common = 0
        while common < min(len(path), len(self.stack)) and _same(path[common], self.stack[common]):
            common += 1
        left = [tuple(self.stack[:depth]) for depth in range(len(self.stack), common, -1)]
        # a module that is entered from outside the layers keeps the name under which it was entered
        self.stack[common:] = path[common:]
        entered = [tuple(self.stack[:depth]) for depth in range(common + 1, len(self.stack) + 1)]
        return left, entered


def _same(one: Step, other: Step) -> bool:
    """Modules around the layers are met from inside a layer, too."""
    return one[0] == other[0] and (one[1] == other[1] or one[0] != LAYER)


class Route:
    """The modules on the way to each op, forward and backward, those that run no op included."""

    def __init__(self, graph: ForwardGraph) -> None:
        self._ops = graph.ops if graph.outside is None else graph.ops[: graph.outside]
        self._index = {op: index for index, op in enumerate(graph.ops)}
        self._idle = {
            index: [tuple((part, slot) for part in module.split(".")) for module, slot in modules]
            for index, modules in graph.idle.items()
        }

    def forward(self, op: Op) -> Iterator[tuple[Step, ...]]:
        """What is run between the op before `op` and `op`, and the modules that it runs in."""
        yield from self._idle.get(self._index[op], ())
        yield path_of(op)

    def backward(self, op: Op, after: int) -> Iterator[tuple[Step, ...]]:
        """The same against the order of forward, from before op number `after` on."""
        for index in range(after, self._index[op], -1):
            yield from reversed(self._idle.get(index, []))
        yield path_of(op)

    def recomputed(self, op: Op) -> Iterator[tuple[Step, ...]]:
        """As `forward`, where the layer of `op` runs again."""
        yield from (path for path in self._idle.get(self._index[op], ()) if path[-1][1] == op.slot)
        yield path_of(op)

    def index(self, op: Op) -> int:
        """Which op of forward `op` is."""
        return self._index[op]

    @property
    def last(self) -> int:
        """Index of the last op of the model."""
        return len(self._ops) - 1


@attrs.define(eq=False)
class Recording:
    """The modules in the order in which the first micro-batch fetched them (`record_module`)."""

    modules: list[tuple[Step, ...]] = attrs.field(factory=list)
    left: dict[Weight, Storage] = attrs.field(factory=dict)
    """What that micro-batch leaves gathered: weights that persist of modules that no hook leaves in backward."""
    kept: dict[tuple[tuple[Step, ...], int], frozenset[Weight]] = attrs.field(factory=dict)
    """By module and step, the weights that stay: decided in the first micro-batch after, and never again.

    `__params_to_release` has an ``lru_cache`` over these two, although what it finds depends on what was prefetched.
    """


@attrs.frozen(eq=False)
class Weight:
    """A weight that is gathered and released."""

    storage: Storage
    dims: tuple[Dim, ...]
    elements: int
    persists: bool
    """`mark_persistent_parameters`: so small that it stays once it is gathered."""


@attrs.frozen
class Limits:
    """All in elements."""

    prefetch: int
    live: int
    reuse: int


class Memory(Protocol):
    """What the coordinator tells to allocate and free."""

    def gather(self, weights: Sequence[Weight]) -> None:
        """Start to gather weights, several in one buffer."""

    def wait(self, weight: Weight) -> None:
        """The weight is needed: whatever was gathered with it is split up."""

    def release(self, weight: Weight) -> None:
        """Free the gathered weight."""


class Coordinator:
    """`PartitionedParameterCoordinator`, with a complete trace or without one.

    Args:
        modules: the weights of each module that has some.
        recording: the modules in the order of their fetches.
        complete: whether the recording is; if not it is made now.
    """

    def __init__(
        self,
        modules: dict[tuple[Step, ...], tuple[Weight, ...]],
        recording: Recording,
        limits: Limits,
        *,
        complete: bool,
    ) -> None:
        self._modules, self._limits = modules, limits
        self._recording = recording
        self._trace = [modules.get(module, ()) for module in recording.modules] if complete else None
        self._queue = deque((w, step) for step, weights in enumerate(self._trace or ()) for w in weights)
        self._step = 0
        self._available = 0
        self._state: dict[Weight, str] = {}
        self._fetched_for: dict[Weight, int] = {}
        self._active: dict[Weight, set[tuple[Step, ...]]] = {}

    def fork(self) -> Coordinator:
        """A copy that goes on from here."""
        other = copy.copy(self)
        other._queue = self._queue.copy()
        other._state, other._fetched_for = self._state.copy(), self._fetched_for.copy()
        other._active = {weight: modules.copy() for weight, modules in self._active.items()}
        return other

    def hold(self, weight: Weight) -> None:
        """A weight that is gathered from the beginning."""
        self._state[weight] = "available"

    def fetch(self, module: tuple[Step, ...], memory: Memory) -> None:
        """`fetch_sub_module`: gather what the module needs, wait for it, and gather ahead."""
        needed = self._modules.get(module, ())
        self._gather([weight for weight in needed if weight not in self._state], memory)
        for weight in needed:
            self._active.setdefault(weight, set()).add(module)
            if self._state[weight] == "in flight":
                memory.wait(weight)
                self._state[weight] = "available"
        if self._trace is None:
            self._recording.modules.append(module)
        else:
            self._pass_by(needed)
            self._prefetch(memory)
        self._step += 1

    def _gather(self, weights: Sequence[Weight], memory: Memory) -> None:
        """`__all_gather_params_`."""
        if weights:
            memory.gather(weights)
            self._available += sum(weight.elements for weight in weights)
            self._state.update(dict.fromkeys(weights, "in flight"))

    def _pass_by(self, needed: Sequence[Weight]) -> None:
        """Take what this module uses off the queue, unless earlier prefetches have."""
        expected = {weight for weight in needed if self._fetched_for.get(weight, -1) < self._step}
        passed: set[Weight] = set()
        while self._queue and len(passed) < len(expected):
            weight, step = self._queue.popleft()
            self._fetched_for[weight] = step
            passed.add(weight)

    def _prefetch(self, memory: Memory) -> None:
        """What comes next, up to the bucket and to what may be live."""
        most = min(self._limits.live - self._available, self._limits.prefetch)
        chosen: list[Weight] = []
        elements = 0
        while self._limits.prefetch and self._queue and elements < most:
            weight, step = self._queue.popleft()
            self._fetched_for[weight] = max(self._fetched_for.get(weight, -1), step)
            if weight not in self._state and weight not in chosen:
                chosen.append(weight)
                elements += weight.elements
        self._gather(chosen, memory)

    def release(self, module: tuple[Step, ...], memory: Memory) -> None:
        """`release_sub_module`: free what is not used again soon."""
        weights = self._modules.get(module, ())
        if not weights:
            return
        kept = self._decided(module, weights) if self._trace is not None else frozenset()
        for weight in weights:
            self._active.get(weight, set()).discard(module)
            if weight not in kept:
                self._release(weight, memory)

    def _release(self, weight: Weight, memory: Memory) -> None:
        if self._state.get(weight) == "available" and not self._active.get(weight):
            memory.release(weight)
            del self._state[weight]
            self._available -= weight.elements

    def _decided(self, module: tuple[Step, ...], weights: Sequence[Weight]) -> frozenset[Weight]:
        """The weights that stay, as they were found when this module was left at this step for the first time."""
        key = module, self._step
        if key not in self._recording.kept:
            self._recording.kept[key] = frozenset(self._kept(weights))
        return self._recording.kept[key]

    def _kept(self, weights: Sequence[Weight]) -> set[Weight]:
        """The others of `__params_to_release`: persistent, skipped by prefetch, or used within the reuse distance."""
        assert self._trace is not None
        kept = {w for w in weights if w.persists or self._fetched_for.get(w, -1) > self._step}
        traversed = 0
        for used in self._trace[self._step :]:
            if traversed >= self._limits.reuse or len(kept) == len(weights):
                break
            kept.update(weight for weight in used if weight in weights)
            traversed += sum(weight.elements for weight in used)
        return kept

    def release_all(self, memory: Memory, *, persistent: bool) -> None:
        """`release_backward_leftovers`; with `persistent` what `_partition_all_parameters` does before the step."""
        self._active.clear()
        for weight in list(self._state):
            if self._state[weight] == "in flight":
                memory.wait(weight)
                self._state[weight] = "available"
            if persistent or not weight.persists:
                self._release(weight, memory)
