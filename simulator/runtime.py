"""What a framework does around a model: hooks at the moments of a training step, each with its own buffers.

A `Plan` holds frozen `Hooks`; lowering starts each of them once and calls the `Runtime` at every moment. A runtime
allocates and frees through the recorder, as the framework's Python does through the allocator, and decides what a
rank keeps of the weights, their gradients and the optimizer's state.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

import attrs

from hardware.dtypes import DType
from simulator.graph import COMPUTE, ForwardGraph, Op, Storage, Tensor
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.recorder import Recorder
from simulator.roles import Role
from simulator.sizes import AnySize

if TYPE_CHECKING:
    from simulator.autograd import Autograd
    from simulator.plan import Plan


@attrs.frozen
class Turn:
    """One micro-batch of an optimizer step."""

    cold: bool
    """Whether the step is the first of all."""
    first: bool
    """Whether it is the first micro-batch of its step."""
    last: bool
    """Whether it is the last of its step, after which gradients must be ready."""
    second: bool = False
    """Whether it is the second of its step."""


class Job:
    """What is being lowered: the plan, where steps are recorded, and what the rank keeps.

    Attributes:
        recorder: the recorder of the part being lowered.
        resident: what loading leaves of the weights on the device; runtimes replace it.
        gradients: parameter of the graph -> its gradient, while autograd may accumulate into it.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.graph: ForwardGraph = plan.graph
        self.recorder = Recorder()
        self.resident = [t.storage for t in plan.graph.parameters]
        self.gradients: dict[Storage, Storage] = {}

    def keep_instead(self, weights: Sequence[Storage]) -> None:
        """Keep `weights` on the device instead of the model's own."""
        own = {tensor.storage for tensor in self.graph.parameters}
        self.resident = [*weights, *(storage for storage in self.resident if storage not in own)]

    def weights(self) -> list[tuple[Tensor, int | None]]:
        """Every weight of the real model in the order of ``model.parameters()``, with its layer (None: outside)."""
        before = [t for t in self.graph.parameters if t.storage.slot is None]
        by_slot: dict[int, list[Tensor]] = {}
        for tensor in self.graph.parameters:
            if tensor.storage.slot is not None:
                by_slot.setdefault(tensor.storage.slot, []).append(tensor)
        first = next((i for i, t in enumerate(self.graph.parameters) if t.storage.slot is not None), len(before))
        layers = [(t, i) for i, slot in enumerate(self.plan.layout.slots()) for t in by_slot.get(slot, ())]
        return [*((t, None) for t in before[:first]), *layers, *((t, None) for t in before[first:])]

    def repeats(self, slot: int | None) -> int:
        """How many layers of the real model the built layer `slot` stands for."""
        return 1 if slot is None else self.plan.layout.places[slot].repeats

    def allocate(self, name: str, *storages: Storage) -> None:
        """Record kernel or call `name`, which allocates `storages`; free each with `free`."""
        self.recorder.run(name, list(storages))

    def free(self, *storages: Storage) -> None:
        """Let go of storages, whichever part of the program made them."""
        if storages and not self.recorder.steps:
            self.recorder.note("free")
        for storage in storages:
            self.recorder.let_go(storage)


class StageJob(Job):
    """One stage of a rank's pipeline as a framework sees it: a model of its own, on the same device.

    Args:
        job: the rank.
        number: which of its stages.
    """

    def __init__(self, job: Job, number: int) -> None:
        self._rank = job
        self.plan = job.plan
        stage, graph = job.graph.stages[number], job.graph
        ops = graph.ops[stage.first_op : stage.end_op]
        used = {storage for op in ops for storage in op.reads}
        self.graph = attrs.evolve(
            graph,
            ops=ops,
            parameters=[tensor for tensor in graph.parameters if tensor.storage in used],
            outside=None if stage.loss_op is None else stage.loss_op - stage.first_op,
        )
        self.gradients = {}

    @property
    def recorder(self) -> Recorder:
        """The rank's."""
        return self._rank.recorder

    @recorder.setter
    def recorder(self, recorder: Recorder) -> None:
        self._rank.recorder = recorder

    @property
    def resident(self) -> list[Storage]:
        """The rank's."""
        return self._rank.resident

    @resident.setter
    def resident(self, storages: list[Storage]) -> None:
        self._rank.resident = storages


class Runtime:
    """A framework at work. Every method is one moment; those that are not overridden do nothing."""

    cold_differs = False
    """Whether the first micro-batch of all runs otherwise than those that begin later steps."""
    second_differs = False
    """Whether the second micro-batch of all runs otherwise than those after it."""
    first_differs = False
    """Whether the forward of a step's first micro-batch runs otherwise than those after it."""
    last_differs = False
    """Whether the last micro-batch of a step runs otherwise than those before it."""
    clips = False
    """Whether it clips gradients itself, instead of torch's ``clip_grad_norm_``."""
    unscales = False
    """Whether torch's ``GradScaler`` works on the gradients that it leaves."""
    shards_stages = False
    """Whether a pipeline's schedule tells it when to gather the weights of a stage."""
    weights_are_views = False
    """Whether autograd sees weights as views of something: their gradients go on to it, none becomes `.grad`."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def fork(self) -> Self:
        """A copy that goes on from here: containers are copied, what is in them is shared."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict | list | set):
                setattr(other, name, value.copy())
        return other

    def begin_forward(self, turn: Turn) -> None:
        """The model is called."""

    def before_op(self, op: Op) -> None:
        """`op` is about to run in forward."""

    def end_forward(self) -> None:
        """The model returns; its outputs are still held."""

    def begin_backward(self, turn: Turn) -> None:
        """``backward()`` is called."""

    def seed(self, engine: Autograd, gradient: Tensor) -> Tensor:
        """The gradient of the loss, where the framework calls ``backward()`` on something that it made of the loss."""
        return gradient

    def before_node(self, op: Op) -> None:
        """The backward of `op` is about to run; the gradients of its outputs are there."""

    def before_recomputed(self, op: Op) -> None:
        """`op` of a checkpointed layer is about to run again, in backward; the last one only as far as it saves."""

    def place_of(self, weight: Storage) -> Storage | None:
        """What holds `weight` now, if that is not the weight itself: a recomputed op may save it."""
        return None

    def end_recomputation(self) -> None:
        """The last saved tensor of the layer is there: modules that were being run are not left in order."""

    def accumulated(self, parameter: Storage) -> None:
        """Autograd has put a gradient of `parameter` into the job's `gradients`."""

    def end_backward(self) -> None:
        """All gradients are there; the engine runs its final callbacks."""

    def put_by(self) -> dict[Storage, Storage]:
        """Gradients that it keeps from one micro-batch to the next, besides the job's, by their parameters."""
        return {}

    def unshard_stage(self) -> None:
        """The schedule gathers the weights of a stage of a pipeline, and waits for them."""

    def reshard_stage(self) -> None:
        """The schedule frees the gathered weights of a stage of a pipeline."""

    def end_stage(self) -> None:
        """All micro-batches went backward through a stage of a pipeline (`perform_reduce_grad`)."""

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """What the rank's optimizer is given, from what it would be given without this runtime."""
        return list(parameters)

    def updated(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """Those of `parameters` that this rank's optimizer updates; the others' gradients are there all the same."""
        return list(parameters)

    def before_step(self, step: OptimizerStep) -> None:
        """``optimizer.step()`` is called."""

    def before_group(self, step: OptimizerStep) -> None:
        """The optimizer turns to one group of parameters, those of `step`."""

    def after_group(self, step: OptimizerStep) -> None:
        """The optimizer is done with one group of parameters."""

    def cleared(self, gradients: Sequence[Storage]) -> list[Storage]:
        """Which of the optimizer's gradients ``zero_grad(set_to_none=True)`` frees."""
        return list(gradients)

    def after_step(self, step: OptimizerStep) -> None:
        """``optimizer.step()`` is about to return."""


class Hooks(Protocol):
    """The frozen description of a runtime, as a plan holds it.

    One that may act inside the stages of a pipeline has an attribute `in_stages` that is true, and one that may do so
    where backward is split in two, `in_split_backward`.
    """

    def start(self, job: Job) -> Runtime:
        """Set up the rank (its weights go to `job.resident`) and return what acts on it."""
        ...


def buffer(
    label: str, size: AnySize, dtype: DType, role: Role, slot: int | None = None, stream: str = COMPUTE
) -> Storage:
    """A framework's buffer of layer `slot` (None: of the whole model)."""
    return Storage(label, size, dtype, role, slot, stream=stream)
