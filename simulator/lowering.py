"""Lowering a training run: load, a cold optimizer step and a steady one, as one program."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from hardware.errors import UnsupportedError
from simulator.grad_scaler import GradScaler
from simulator.graph import Storage
from simulator.hand_over import Unlike
from simulator.layout import Sharing
from simulator.micro_batch import AfterForward, MicroBatch
from simulator.model import AttentionSpec, ModelSpec
from simulator.optimizer_in_backward import OptimizerInBackward
from simulator.optimizers import optimizers
from simulator.optimizers.clipping import clip_gradient_norm
from simulator.optimizers.step import OptimizerStep, Parameter, Surroundings
from simulator.pipelines.limits import check_pipeline
from simulator.pipelines.loops import PipelinedSteps
from simulator.pipelines.megatron_loops import MegatronPipelinedSteps
from simulator.pipelines.pipeline import Pipeline
from simulator.pipelines.stage_parts import StageParts
from simulator.plan import TRAINABLE_TENSORS, Plan
from simulator.program import Node, Repeat, Seq, TreeBuilder
from simulator.recorder import Step
from simulator.roles import Phase
from simulator.runtime import Job, Runtime, StageJob, Turn
from simulator.sizes import Bindings
from simulator.workload import ONE_DEVICE, WHOLE_WEIGHTS


@attrs.frozen(eq=False)
class TrainingProgram:
    """The program of a training run and the values of its dimensions."""

    load: Node
    cold: Node
    steady: Node
    bindings: Bindings


def lower(plan: Plan) -> TrainingProgram:
    """The program of `plan`: load the model, one cold and one steady optimizer step."""
    sharing = plan.sharing
    while True:
        try:
            return _Lowering(plan).program(plan.pipeline)
        except Unlike as unlike:
            sharing = unlike.so_far if unlike.so_far is not sharing else Sharing.TURNS
            plan = attrs.evolve(plan, sharing=sharing)


def lower_ranks(plans: Sequence[Plan]) -> list[TrainingProgram]:
    """The programs of a pipeline's ranks; those that differ in the order of their actions alone share their parts."""
    known: list[_Lowering] = []
    programs = []
    for plan in plans:
        lowering = next((each for each in known if _same_parts(each.plan, plan)), None)
        if lowering is None:
            lowering = _Lowering(plan)
            known.append(lowering)
        elif plan.pipeline is not None:
            check_pipeline(plan)  # its order is its own
        programs.append(lowering.program(plan.pipeline))
    return programs


def _same_parts(one: Plan, other: Plan) -> bool:
    """Whether plans of two ranks are equal but for which stages they have, and when they run."""
    if (
        one.pipeline is None
        or other.pipeline is None
        or one.pipeline.megatron
        or not one.pipeline.runs_like(other.pipeline)
    ):
        return False
    return attrs.astuple(attrs.evolve(one, pipeline=None), recurse=False) == attrs.astuple(
        attrs.evolve(other, pipeline=None), recurse=False
    )


class _Lowering:
    def __init__(self, plan: Plan) -> None:
        by_torch = plan.pipeline is not None and plan.pipeline.megatron is None
        if by_torch:
            check_pipeline(plan)
        self.plan = plan
        self.training = plan.training
        self.builder = TreeBuilder(plan.layout, plan.graph)
        self.job = Job(plan)
        self._states: dict[tuple[Storage, str], Storage] = {}
        self._constructed: list[Step] = []
        stages = (
            [StageJob(self.job, number) for number in range(len(self.job.graph.stages))]
            if plan.hooks and by_torch
            else []
        )
        by_stage = [[hooks.start(job) for hooks in plan.hooks] for job in stages]
        in_stages = [runtime for each in by_stage for runtime in each]
        self.runtimes: list[Runtime] = in_stages or [hooks.start(self.job) for hooks in plan.hooks]
        if self.training.optimizer_in_backward:
            if plan.hooks or plan.tensor_parallel:
                raise UnsupportedError("'optimizer_in_backward' with a strategy is not modelled: leave one of them out")
            self.runtimes.append(OptimizerInBackward(self.job, self._update))
        if self.training.grad_scaler:
            if plan.tensor_parallel or not all(runtime.unscales for runtime in self.runtimes):
                raise UnsupportedError(
                    "'grad_scaler' with a strategy other than ddp is not modelled: leave one of them out"
                )
            self.runtimes.insert(0, GradScaler(self.job))
        self._cold_differs = any(runtime.cold_differs for runtime in self.runtimes)
        self._second_differs = any(runtime.second_differs for runtime in self.runtimes)
        self._first_differs = any(runtime.first_differs for runtime in self.runtimes)
        self._last_differs = any(runtime.last_differs for runtime in self.runtimes)
        self._megatron = self._megatron_steps()
        self._stages = StageParts(self.job, self.builder, by_stage) if by_torch else None
        self._optimizer_nodes: dict[bool, list[Node]] = {}
        self._load_node: Node | None = None
        self._micro_batch = MicroBatch(self.job, self.runtimes)
        self._forwards: dict[tuple[bool, ...], tuple[Node, AfterForward]] = {}
        self._turns: dict[tuple[bool, ...], Node] = {}

    def _megatron_steps(self) -> MegatronPipelinedSteps | None:
        loop = self.plan.pipeline and self.plan.pipeline.megatron
        return MegatronPipelinedSteps(self.job, loop, self.builder, self.runtimes) if loop else None

    def program(self, pipeline: Pipeline | None) -> TrainingProgram:
        """The program of the plan, or of one like it that has a `pipeline` of its own."""
        cold: Node
        steady: Node
        if pipeline is not None and self._stages is not None:
            steps = PipelinedSteps(self._stages, pipeline)
            cold, steady = (Seq((*steps.step(cold=cold), *self._optimizer_of(cold=cold))) for cold in (True, False))
        else:
            cold, steady = (self._step(cold=cold) for cold in (True, False))
        if self._load_node is None:
            load = self.builder.tree([*self._load(), *self._constructed])  # an optimizer's constructor runs last
            self._load_node = Seq((load, *self._stages.load)) if self._stages else load
        self.builder.check()
        return TrainingProgram(self._load_node, cold, steady, self.plan.dimensions.bindings)

    def _optimizer_of(self, *, cold: bool) -> list[Node]:
        if cold not in self._optimizer_nodes:
            assert self._stages is not None
            self.job.gradients = self._stages.gradients()
            self._optimizer_nodes[cold] = self._optimizer()
        return self._optimizer_nodes[cold]

    def _load(self) -> list[Step]:
        graph = self.job.graph
        kept = [t.storage for t in (*graph.buffers, *graph.inputs) if t.storage.persistent]
        return [Step(f"load {s.label}", Phase.LOAD, "", s.slot, [s]) for s in (*self.job.resident, *kept)]

    def _step(self, *, cold: bool) -> Node:
        """First micro-batch, the second and the last where they differ, those between them; then the optimizer."""
        if self._megatron is not None:
            return Seq((*self._megatron.step(cold=cold), *self._optimizer(), *self._megatron.end_step()))
        count = self.training.gradient_accumulation
        parts = [self._turn(Turn(cold, first=True, last=count == 1))]
        if count > 1 and cold and self._second_differs:
            parts.append(self._turn(Turn(cold, first=False, last=count == 2, second=True)))
        left = count - len(parts)
        alike = left - 1 if self._last_differs else left
        if alike > 0:
            parts.append(Repeat(alike, self._turn(Turn(cold, first=False, last=False))))
        if left > 0 and self._last_differs:
            parts.append(self._turn(Turn(cold, first=False, last=True)))
        return Seq(tuple(parts) if self.training.optimizer_in_backward else (*parts, *self._optimizer()))

    def _turn(self, turn: Turn) -> Node:
        """Forward and backward of one micro-batch; those that run alike are built once."""
        standing = not turn.cold and self.training.zero_grad == "zero"  # gradients of the step before, set to zero
        fresh = turn.first and not standing
        last = turn.last and self._last_differs
        # where the last micro-batch differs, the first is no later one, even with gradients from the step before
        kind = (self._last_differs and standing, self._last_differs and turn.first)
        key = (fresh, *self._forward_key(turn), last, *kind)
        if key not in self._turns:
            if fresh:
                self.job.gradients.clear()
            forward, after = self._forward(turn)
            self._turns[key] = Seq((forward, self.builder.tree(self._micro_batch.backward(turn, after))))
        return self._turns[key]

    def _forward_key(self, turn: Turn) -> tuple[bool, bool, bool]:
        """What tells forwards apart: the first and second of all, and the first of a step."""
        second = turn.cold and turn.second and self._second_differs
        return turn.cold and turn.first and self._cold_differs, second, turn.first and self._first_differs

    def _forward(self, turn: Turn) -> tuple[Node, AfterForward]:
        key = self._forward_key(turn)
        if key not in self._forwards:
            node = self.builder.tree(self._micro_batch.forward(turn))
            assert self._micro_batch.after_forward is not None
            self._forwards[key] = node, self._micro_batch.after_forward
        return self._forwards[key]

    def _parameters(self) -> list[Parameter]:
        """What the rank's optimizer is given: every trainable weight, unless a framework keeps something else."""
        gradients = self.job.gradients
        trainable = [t for t in self.job.graph.parameters if t.requires_grad and t.storage in gradients]
        placed = self.job.graph.placements
        parameters = [
            Parameter(t.storage, gradients[t.storage], t.shape, t.storage in placed, placed.get(t.storage))
            for t in trainable
        ]
        for runtime in self.runtimes:
            parameters = runtime.trainable(parameters)
        return parameters

    def _check_whole(self, updated: Sequence[Parameter]) -> None:
        """Some optimizers are simulated on the model's own weights only: of pieces they would keep something else."""
        name = self.training.optimizer.name
        if name in ONE_DEVICE and self.plan.mesh.world > 1:
            raise UnsupportedError(f"'optimizer' {name} on several GPUs is not modelled: use adamw")
        own = {tensor.storage for tensor in self.job.graph.parameters}
        if name in WHOLE_WEIGHTS and any(p.distributed or p.storage not in own for p in updated):
            rule = "on sharded or flattened weights is not modelled"
            raise UnsupportedError(
                f"'optimizer' {name} {rule}: use adamw, or a strategy that keeps weights whole (ddp)"
            )

    def _update(self, parameters: Sequence[Parameter]) -> OptimizerStep:
        """The step of an optimizer that has some of the parameters only."""
        step = self._optimizer_step(parameters, parameters)
        self._run(step)
        return step

    def _optimizer_step(self, updated: Sequence[Parameter], held: Sequence[Parameter]) -> OptimizerStep:
        self._check_whole(updated)
        surroundings = Surroundings(
            tensors=TRAINABLE_TENSORS,
            dimensions=self.plan.dimensions,
            heads=_heads(self.plan.model),
            kernel_workspace=self.training.kernel_workspace,
        )
        return OptimizerStep(self.training.optimizer, updated, self._states, surroundings, held)

    def _run(self, step: OptimizerStep) -> None:
        """Record the optimizer's work on all of its groups."""
        for group in step.groups():
            for runtime in self.runtimes:
                runtime.before_group(group)
            optimizers.get(self.training.optimizer.name)(group)
            group.finish()
            for runtime in self.runtimes:
                runtime.after_group(group)
        self._constructed += [Step(f"load {s.label}", Phase.LOAD, "", s.slot, [s]) for s in step.constructed]

    def _optimizer(self) -> list[Node]:
        held = updated = self._parameters()
        for runtime in self.runtimes:
            updated = runtime.updated(updated)
        step = self._optimizer_step(updated, held)
        for runtime in self.runtimes:
            runtime.before_step(step)
        if self.training.clip is not None and not any(runtime.clips for runtime in self.runtimes):
            clip_gradient_norm(step)
        self._run(step)
        if self.training.zero_grad == "none":
            gradients = step.gradients
            for runtime in self.runtimes:
                gradients = runtime.cleared(gradients)
            step.free(gradients)
        for runtime in self.runtimes:
            runtime.after_step(step)
        return [self.builder.tree(step.steps)] if step.steps else []  # plain SGD allocates nothing at all


def _heads(model: ModelSpec) -> int:
    """Attention heads of the first layer that has any."""
    mixers = (layer.token_mixer for layer in model.layers)
    return next((mixer.heads for mixer in mixers if isinstance(mixer, AttentionSpec)), 1)
