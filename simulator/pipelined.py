"""Lowering the step of a pipelined rank: parts in the schedule's order, and what torch's loop holds in between.

Source: torch 2.13 torch/distributed/pipelining/schedules.py `ScheduleGPipe._step_microbatches`,
`Schedule1F1B._step_microbatches`, `_PipelineScheduleRuntime._step_microbatches`; stage.py `PipelineStage`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs

from hardware.errors import UnsupportedError
from simulator.graph import Storage, Tensor
from simulator.pipeline import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    MICRO_BATCHES,
    RESHARD,
    UNSHARD,
    Action,
    Pipeline,
    Turns,
)
from simulator.pipeline_gathering import with_gathering
from simulator.plan import Plan
from simulator.program import Node, Occurrence, Repeat, Seq, TreeBuilder
from simulator.recorder import Step
from simulator.roles import Phase, Role
from simulator.runtime import Job, Runtime, buffer
from simulator.sizes import size_of
from simulator.stage_micro_batch import Gradients, StageBackward, StageForward, StageMicroBatch

#: A storage of one optimizer step and, there, of one micro-batch.
Kept = tuple[Storage, int, int]
#: A variable of torch's: what it is, and of which stage and micro-batch where it has one of each.
Name = tuple[str, int, int]
#: Locals of the loop: what the last forward returned, and the gradient that is being sent.
OUTPUT, SENT = ("output", 0, 0), ("sent", 0, 0)
#: All micro-batches went backward through a stage.
END = "end"
#: Lists of one entry for each micro-batch, which all go at once when the next step begins.
PILED = frozenset(("returned", "received.grad", "loss"))


@attrs.frozen(eq=False)
class _Forward:
    model: Node
    loss: Node | None
    recorded: StageForward


@attrs.frozen(eq=False)
class _Backward:
    node: Node
    recorded: StageBackward
    left: Gradients


class StageParts:
    """What the stages of a rank run, each part lowered once: the same for every order, on every rank like it.

    Args:
        job: the rank.
        builder: makes trees of recorded steps.
        runtimes: of each stage, what frameworks do inside it.
    """

    def __init__(self, job: Job, builder: TreeBuilder, runtimes: Sequence[Sequence[Runtime]] = ()) -> None:
        every = [runtime for each in runtimes for runtime in each]
        self.plan = job.plan
        self.stages = job.graph.stages
        self._builder = builder
        self._micro_batch = StageMicroBatch(job, runtimes)
        self.shards_stages = any(runtime.shards_stages for runtime in every)
        """Whether frameworks gather the weights of a stage, and may be told when."""
        self._first_differs = bool(every)
        self._last_differs = any(runtime.last_differs for runtime in every)
        self._forwards: dict[tuple[int, bool], _Forward] = {}
        self._backwards: dict[tuple[str, int, Gradients, bool], _Backward] = {}
        self._inputs: dict[int, StageBackward] = {}
        self._outside: dict[tuple[str, int, Gradients], list[Node]] = {}
        self._others: dict[object, Node] = {}
        count = job.plan.training.gradient_accumulation
        #: `_setup_forward_recv_info`, `_create_grad_recv_info`: a buffer for each micro-batch, kept from step to step.
        self.received: dict[tuple[str, int], Storage] = {}
        for number, stage in enumerate(self.stages):
            if stage.received is not None:
                self._receive("activation", number, stage.received.storage)
            if stage.loss is None:
                self._receive("gradient", number, stage.gradient_received().storage)
        self.load = [Repeat(count, self._loaded(made), whole=True) for made in self.received.values()]

    def _receive(self, what: str, number: int, like: Storage) -> None:
        made = buffer(f"stage{number}.received_{what}", like.size, like.dtype, Role.RECEIVED)
        self.received[what, number] = made

    def _loaded(self, storage: Storage) -> Node:
        return self._builder.tree([Step(f"load {storage.label}", Phase.LOAD, "", None, [storage])])

    def forward(self, number: int, *, first: bool) -> _Forward:
        """The forward of stage `number` of the rank; the `first` of a step, or a later one."""
        key = number, first or not self._first_differs
        if key not in self._forwards:
            recorded = self._micro_batch.forward_stage(number, first=key[1])
            loss = self._builder.tree(recorded.loss) if recorded.loss else None
            self._forwards[key] = _Forward(self._builder.tree(recorded.model), loss, recorded)
        return self._forwards[key]

    def backward(self, kind: str, number: int, state: Gradients, *, last: bool) -> _Backward:
        """A backward of stage `number`, of one of the kinds that torch has letters for.

        Args:
            state: what gradients there are before.
            last: whether it is the last through this stage.
        """
        key = kind, number, state, last and self._last_differs
        if key not in self._backwards:
            self._micro_batch.begin_with(number, state)
            recorded = self._lower(kind, number, last=key[3])
            upward = kind == BACKWARD_WEIGHT  # weights have their turns in the order of ``parameters()``
            node = self._builder.tree(recorded.steps, upward=upward)
            self._backwards[key] = _Backward(node, recorded, self._micro_batch.state_of(number))
        return self._backwards[key]

    def _lower(self, kind: str, number: int, *, last: bool) -> StageBackward:
        if kind == BACKWARD_WEIGHT:
            return self._micro_batch.backward_weight(number, self._inputs[number])
        later = self._forwards.get((number, False)) or self._forwards[number, True]
        after = later.recorded.after
        if kind == BACKWARD:
            return self._micro_batch.backward_stage(number, after, last=last)
        done = self._micro_batch.backward_input(number, after)
        self._inputs.setdefault(number, done)
        return done

    def outside(self, moment: str, number: int, state: Gradients) -> list[Node]:
        """What frameworks do about stage `number` outside of any micro-batch.

        Args:
            moment: `END`, or one of the actions that a schedule has for weights.
            number: which of the rank's stages.
            state: what gradients there are before.
        """
        key = moment, number, state
        if key not in self._outside:
            micro_batch = self._micro_batch
            micro_batch.begin_with(number, state)
            lower = {UNSHARD: micro_batch.unshard_stage, RESHARD: micro_batch.reshard_stage, END: micro_batch.end_stage}
            steps = lower[moment](number)
            self._outside[key] = [self._builder.tree(steps, upward=True)] if steps else []
        return self._outside[key]

    def gradients(self) -> dict[Storage, Storage]:
        """Those of all stages, by their parameters."""
        return {parameter: gradient for each in self._micro_batch.gradients for parameter, gradient in each.items()}

    def free(self, storage: Storage) -> Node:
        """The last holder of a storage goes."""
        if storage not in self._others:
            self._others[storage] = self._builder.tree([Step("free", Phase.BACKWARD, "", None, [], [storage])])
        return self._others[storage]

    def merged(self, output: Tensor | None) -> Node:
        """`merge_chunks`, after the last backward: all outputs in one tensor, of which the caller makes no use."""
        assert output is not None
        if output not in self._others:
            size = size_of((MICRO_BATCHES, *output.dims), output.dtype.bits)
            made = buffer("outputs", size, output.dtype, Role.BACKWARD)
            self._others[output] = self._builder.tree([Step("cat.default", Phase.BACKWARD, "", None, [made], [made])])
        return self._others[output]


class PipelinedSteps:
    """The micro-batches of an optimizer step on one rank of a pipeline.

    Args:
        parts: what its stages run.
        pipeline: the rank's stages and the order of its actions.
    """

    def __init__(self, parts: StageParts, pipeline: Pipeline) -> None:
        self._made = parts
        self._pipeline = pipeline
        self._stages = parts.stages
        self._holders: Counter[Kept] = Counter()
        self._names: dict[Name, Kept] = {}
        self._parts: list[Node] = []
        self._gradients: dict[int, Gradients] = {}
        self._begun: Counter[int] = Counter()
        self._ended: Counter[int] = Counter()
        self._numbered = pipeline.numbered
        gathers = parts.shards_stages and pipeline.runtime == "runtime"
        self._order = with_gathering(pipeline.order) if gathers else pipeline.order
        self._gathers = gathers
        self._step = 0
        self._turns: Turns | None = None
        """What runs now, if it runs several times."""
        self._replaces = any(pipeline.next_is_here(number) is not None for number in range(len(self._stages)))
        """Whether what a stage hands to another replaces a buffer, or what was handed over in the step before."""
        self._alike: dict[Name, Turns] = {}
        """Variables that stand for those of several micro-batches."""
        self._run = {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            BACKWARD_INPUT: self._backward_input,
            BACKWARD_WEIGHT: self._backward_weight,
            UNSHARD: self._move_weights,
            RESHARD: self._move_weights,
        }
        for (what, number), made in parts.received.items():
            for micro_batch in range(self._numbered):
                self._name((what, number, micro_batch), (made, self._step, micro_batch))

    # what Python holds ---------------------------------------------------------------------------------------------

    def _name(self, name: Name, kept: Kept | None) -> None:
        """Bind a variable of torch's to `kept`, and drop what it was bound to: the last holder frees it."""
        old = self._names.pop(name, None)
        turns = self._alike.pop(name, None)
        if kept is not None:
            self._names[name] = kept
            self._holders[kept] += 1
            if self._turns is not None and name[0] in PILED:
                self._alike[name] = self._turns
        if old is not None:
            self._holders[old] -= 1
            if not self._holders[old]:
                once = self._made.free(old[0])
                self._parts.append(once if turns is None else Repeat(turns.count, once, whole=self._left_whole(turns)))

    # the schedule --------------------------------------------------------------------------------------------------

    def step(self, *, cold: bool) -> Sequence[Node]:
        """All micro-batches of a step; the first has no gradients to add to unless they were set to zero."""
        self._parts = []
        self._step += 1
        standing = not cold and self._made.plan.training.zero_grad == "zero"
        self._gradients = dict.fromkeys(range(len(self._stages)), (False, standing, False))
        self._begun, self._ended = Counter(), Counter()
        self._drop(*PILED)  # `clear_runtime_states`; and the caller has a new list of losses
        for action in self._order:
            if isinstance(action, Turns):
                self._repeat(action)
            else:
                self._run[action.kind](action)
        self._drop("output", "sent")
        if self._pipeline.return_outputs:
            self._parts += [self._made.merged(stage.output) for stage in self._stages if stage.loss is not None]
        return _occurrences(self._parts)

    def _left_whole(self, turns: Turns) -> bool:
        """Whether no turn may be left out of a timeline: each leaves more than a loss, or replaces what is there."""
        piles_up = self._pipeline.return_outputs or any(action.kind == BACKWARD_INPUT for action in turns.actions)
        return self._replaces or piles_up or not turns.balanced

    def _repeat(self, turns: Turns) -> None:
        before, self._parts, self._turns = self._parts, [], turns
        for action in turns.actions:
            self._run[action.kind](action)
        body = Seq(tuple(_occurrences(self._parts)))
        whole = self._left_whole(turns)
        self._parts, self._turns = [*before, Repeat(turns.count, body, whole=whole)], None

    def _move_weights(self, action: Action) -> None:
        if self._ended[action.chunk] == self._numbered:
            return  # they went when the stage's gradients were reduced
        self._parts += self._made.outside(action.kind, action.chunk, self._gradients[action.chunk])

    def _drop(self, *variables: str) -> None:
        """`variables` go, whatever the stage and micro-batch."""
        for name in [name for name in self._names if name[0] in variables]:
            self._name(name, None)

    def _forward(self, action: Action) -> None:
        number, micro_batch = action.chunk, action.micro_batch
        stage = self._stages[number]
        forward = self._made.forward(number, first=not self._begun[number] and not self._gathers)
        self._begun[number] += 1
        self._parts.append(forward.model)
        assert stage.output is not None
        output = stage.output.storage, self._step, micro_batch
        self._name(("forward cache", number, micro_batch), output)
        if self._pipeline.runtime != "runtime":
            self._name(OUTPUT, output)
        if forward.loss is not None:
            self._parts.append(forward.loss)
        if stage.loss is not None:
            if self._pipeline.return_outputs:
                self._name(("returned", number, micro_batch), output)
            self._name(("loss", number, micro_batch), (stage.loss.storage, self._step, micro_batch))
        following = self._pipeline.next_is_here(number)
        if following is not None:  # `set_local_fwd_input`
            self._name(("activation", following, micro_batch), output)

    def _backward(self, action: Action) -> None:
        number, micro_batch = action.chunk, action.micro_batch
        if self._pipeline.runtime == "gpipe":
            self._name(SENT, None)  # `ops` is bound to what the next backward receives
        done = self._part(action)
        self._name(("forward cache", number, micro_batch), None)
        if done.gradient is not None:
            self._send(number, (done.gradient, self._step, micro_batch))
        self._end(number)

    def _end(self, number: int) -> None:
        """`perform_reduce_grad`, after the last backward of a stage."""
        if self._ended[number] == self._numbered:
            self._parts += self._made.outside(END, number, self._gradients[number])

    def _backward_input(self, action: Action) -> None:
        """Of the first stage, whose input needs no gradient, nothing is computed until its weights' turn."""
        number, micro_batch = action.chunk, action.micro_batch
        stage = self._stages[number]
        if stage.received is None:
            return
        done = self._part(action)
        if stage.loss is not None:  # `backward_state` keeps what the stage returned, of the last stage the loss
            self._name(("forward cache", number, micro_batch), None)
        assert done.gradient is not None
        gradient = done.gradient, self._step, micro_batch
        self._name(("received.grad", number, micro_batch), gradient)
        self._send(number, gradient)

    def _backward_weight(self, action: Action) -> None:
        number, micro_batch = action.chunk, action.micro_batch
        if self._stages[number].received is None:
            self._backward(attrs.evolve(action, kind=BACKWARD))
            return
        self._part(action)
        self._name(("forward cache", number, micro_batch), None)
        self._end(number)

    def _part(self, action: Action) -> StageBackward:
        """Run a backward; what it does depends on the gradients that it finds."""
        number, weights = action.chunk, action.kind != BACKWARD_INPUT
        self._ended[number] += weights
        last = weights and self._ended[number] == self._numbered
        found = self._made.backward(action.kind, number, self._gradients[number], last=last)
        self._gradients[number] = found.left
        self._parts.append(found.node)
        return found.recorded

    def _send(self, number: int, gradient: Kept) -> None:
        """`get_bwd_send_ops`, or `set_local_bwd_input` where the stage before is on this rank, too."""
        before = self._pipeline.previous_is_here(number)
        if before is not None:
            self._name(("gradient", before, gradient[-1]), gradient)
        else:
            self._name(SENT, gradient)
            if self._pipeline.runtime == "runtime":
                self._name(SENT, None)


def _occurrences(parts: Sequence[Node]) -> list[Node]:
    return [Occurrence(number, part) for number, part in enumerate(parts)]


def check_pipeline(plan: Plan) -> None:
    """Refuse what was not compared with recordings of pipelines.

    Raises:
        UnsupportedError: the option, and a way out.
    """
    training, split = plan.training, plan.pipeline is not None and plan.pipeline.splits_backward
    names = {str(getattr(hooks, "name", type(hooks).__name__)): hooks for hooks in plan.hooks}
    for name, hooks in names.items():
        if not getattr(hooks, "in_stages", False):
            raise UnsupportedError(f"a pipeline with {name} in its stages is not modelled: use fsdp2 or ddp")
        if split and not getattr(hooks, "in_split_backward", False):
            raise UnsupportedError(
                f"{name} is not told of weights' gradients where backward is split in two, and would not reduce them: "
                "use fsdp2, or schedule interleaved_1f1b"
            )
    if split and plan.recomputed:
        raise UnsupportedError("checkpoints in a backward split in two are not modelled: take another schedule")
    if plan.tensor_parallel and training.implementation != "torchtitan":
        raise UnsupportedError("'tp' in a pipeline is modelled for implementation torchtitan alone: use it, or tp 1")
    others = {
        "checkpoints of several layers, some of which other ranks have": plan.together > 1,
        "'zero_grad' zero and a strategy in its stages": bool(names) and training.zero_grad == "zero",
        "frozen weights": plan.frozen or plan.frozen_layers,
        "reentrant checkpoints": plan.reentrant,
        "compiled layers": plan.compiled,
        "float8": plan.float8,
        "'liger'": training.liger.kernels,
        "'items_in_batch'": training.items_in_batch,
        "'autocast' (torchtitan leaves it to fsdp2's param_dtype)": training.autocast,
        "'grad_scaler'": training.grad_scaler,
        "'optimizer_in_backward'": training.optimizer_in_backward,
        "'keep_outputs'": training.keep_outputs,
    }
    for name, given in others.items():
        if given:
            raise UnsupportedError(f"a pipeline with {name} is not modelled yet: leave one out")
