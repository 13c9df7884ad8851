"""Lowering the step of a pipelined rank: parts in the schedule's order, and what torch's loop holds in between.

Source: torch 2.13 torch/distributed/pipelining/schedules.py `ScheduleGPipe._step_microbatches`,
`Schedule1F1B._step_microbatches`, `_PipelineScheduleRuntime._step_microbatches`; stage.py `PipelineStage`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import attrs

from hardware.errors import UnsupportedError
from simulator.graph import Storage, Tensor
from simulator.pipeline import BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, MICRO_BATCHES, Action, Pipeline
from simulator.plan import Plan
from simulator.program import Node, Occurrence, TreeBuilder
from simulator.recorder import Step
from simulator.roles import Phase, Role
from simulator.runtime import Job, buffer
from simulator.sizes import size_of
from simulator.stage_micro_batch import StageBackward, StageForward, StageMicroBatch

#: A storage of one optimizer step and, there, of one micro-batch.
Kept = tuple[Storage, int, int]
#: A variable of torch's: what it is, and of which stage and micro-batch where it has one of each.
Name = tuple[str, int, int]
#: Locals of the loop: what the last forward returned, and the gradient that is being sent.
OUTPUT, SENT = ("output", 0, 0), ("sent", 0, 0)


@attrs.frozen(eq=False)
class _Forward:
    model: Node
    loss: Node | None
    recorded: StageForward


@attrs.frozen(eq=False)
class _Backward:
    node: Node
    recorded: StageBackward


class PipelinedSteps:
    """The micro-batches of an optimizer step on one rank of a pipeline.

    Args:
        job: the rank, whose residents get the buffers to receive in.
        pipeline: the rank's stages and the order of its actions.
        builder: makes trees of recorded steps.
    """

    def __init__(self, job: Job, pipeline: Pipeline, builder: TreeBuilder) -> None:
        _check(job.plan)
        self._job = job
        self._pipeline = pipeline
        self._builder = builder
        self._stages = job.graph.stages
        self._micro_batch = StageMicroBatch(job)
        self._forwards: dict[int, _Forward] = {}
        self._backwards: dict[tuple[str, int, bool], _Backward] = {}
        self._frees: dict[Storage, Node] = {}
        self._holders: Counter[Kept] = Counter()
        self._names: dict[Name, Kept] = {}
        self._parts: list[Node] = []
        self._new: dict[int, bool] = {}
        self._step = 0
        self._whole_output: Node | None = None
        self._receive_buffers()

    def _receive_buffers(self) -> None:
        """`_setup_forward_recv_info`, `_create_grad_recv_info`: one buffer per micro-batch, kept from step to step."""
        count = self._job.plan.training.gradient_accumulation
        for number, stage in enumerate(self._stages):
            if stage.received is not None:
                self._allocate("activation", number, stage.received.storage, count)
            if stage.loss is None:
                self._allocate("gradient", number, stage.gradient_received().storage, count)

    def _allocate(self, what: str, number: int, like: Storage, count: int) -> None:
        made = buffer(f"stage{number}.received_{what}", like.size, like.dtype, Role.RECEIVED)
        self._job.resident = [*self._job.resident, *[made] * count]
        for micro_batch in range(count):
            self._name((what, number, micro_batch), (made, self._step, micro_batch))

    # what Python holds ---------------------------------------------------------------------------------------------

    def _name(self, name: Name, kept: Kept | None) -> None:
        """Bind a variable of torch's to `kept`, and drop what it was bound to: the last holder frees it."""
        old = self._names.pop(name, None)
        if kept is not None:
            self._names[name] = kept
            self._holders[kept] += 1
        if old is not None:
            self._holders[old] -= 1
            if not self._holders[old]:
                self._parts.append(self._free(old[0]))

    def _free(self, storage: Storage) -> Node:
        if storage not in self._frees:
            step = Step("free", Phase.BACKWARD, "", None, [], [storage])
            self._frees[storage] = self._builder.tree([step])
        return self._frees[storage]

    # the schedule --------------------------------------------------------------------------------------------------

    def step(self, *, cold: bool) -> Sequence[Node]:
        """All micro-batches of a step; the first has no gradients to add to unless they were set to zero."""
        self._parts = []
        self._step += 1
        standing = not cold and self._job.plan.training.zero_grad == "zero"
        self._new = dict.fromkeys(range(len(self._stages)), not standing)
        self._drop(
            "returned", "received.grad", "loss"
        )  # `clear_runtime_states`; and the caller has a new list of losses
        run = {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            BACKWARD_INPUT: self._backward_input,
            BACKWARD_WEIGHT: self._backward_weight,
        }
        for action in self._pipeline.order:
            run[action.kind](action)
        self._drop("output", "sent")
        if self._pipeline.return_outputs:
            self._parts += [self._merged(stage.output) for stage in self._stages if stage.loss is not None]
        return [Occurrence(number, part) for number, part in enumerate(self._parts)]

    def _drop(self, *variables: str) -> None:
        """`variables` go, whatever the stage and micro-batch."""
        for name in [name for name in self._names if name[0] in variables]:
            self._name(name, None)

    def _merged(self, output: Tensor | None) -> Node:
        """`merge_chunks`, after the last backward: all outputs in one tensor, of which the caller makes no use."""
        assert output is not None
        if self._whole_output is None:
            size = size_of((MICRO_BATCHES, *output.dims), output.dtype.bits)
            merged = buffer("outputs", size, output.dtype, Role.BACKWARD)
            self._whole_output = self._builder.tree([Step("cat.default", Phase.BACKWARD, "", None, [merged], [merged])])
        return self._whole_output

    def _forward(self, action: Action) -> None:
        number, micro_batch = action.chunk, action.micro_batch
        stage = self._stages[number]
        if number not in self._forwards:
            self._forwards[number] = self._lower_forward(number)
        forward = self._forwards[number]
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

    def _lower_forward(self, number: int) -> _Forward:
        recorded = self._micro_batch.forward_stage(number)
        loss = self._builder.tree(recorded.loss) if recorded.loss else None
        return _Forward(self._builder.tree(recorded.model), loss, recorded)

    def _backward(self, action: Action) -> None:
        number, micro_batch = action.chunk, action.micro_batch
        if self._pipeline.runtime == "gpipe":
            self._name(SENT, None)  # `ops` is bound to what the next backward receives
        after = self._forwards[number].recorded.after
        done = self._part(action, lambda: self._micro_batch.backward_stage(number, after))
        self._new[number] = False
        self._name(("forward cache", number, micro_batch), None)
        if done.gradient is not None:
            self._send(number, (done.gradient, self._step, micro_batch))

    def _backward_input(self, action: Action) -> None:
        """Of the first stage, whose input needs no gradient, nothing is computed until its weights' turn."""
        number, micro_batch = action.chunk, action.micro_batch
        stage = self._stages[number]
        if stage.received is None:
            return
        after = self._forwards[number].recorded.after
        done = self._part(action, lambda: self._micro_batch.backward_input(number, after))
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
        first = self._backwards[BACKWARD_INPUT, number, False]
        self._part(action, lambda: self._micro_batch.backward_weight(number, first.recorded))
        self._new[number] = False
        self._name(("forward cache", number, micro_batch), None)

    def _part(self, action: Action, lower: Callable[[], StageBackward]) -> StageBackward:
        """Run a backward; those that run alike are lowered once."""
        key = action.kind, action.chunk, action.kind != BACKWARD_INPUT and self._new[action.chunk]
        if key not in self._backwards:
            recorded = lower()
            upward = action.kind == BACKWARD_WEIGHT  # weights have their turns in the order of ``parameters()``
            self._backwards[key] = _Backward(self._builder.tree(recorded.steps, upward=upward), recorded)
        self._parts.append(self._backwards[key].node)
        return self._backwards[key].recorded

    def _send(self, number: int, gradient: Kept) -> None:
        """`get_bwd_send_ops`, or `set_local_bwd_input` where the stage before is on this rank, too."""
        before = self._pipeline.previous_is_here(number)
        if before is not None:
            self._name(("gradient", before, gradient[-1]), gradient)
        else:
            self._name(SENT, gradient)
            if self._pipeline.runtime == "runtime":
                self._name(SENT, None)


def _check(plan: Plan) -> None:
    """Refuse what was not compared with recordings of pipelines."""
    training = plan.training
    others = {
        "the strategies after it": plan.hooks or plan.tensor_parallel,
        "frozen weights": plan.frozen or plan.frozen_layers,
        "reentrant checkpoints": plan.reentrant,
        "compiled layers": plan.compiled,
        "float8": plan.float8,
        "'liger'": training.liger.kernels,
        "'items_in_batch'": training.items_in_batch,
        "'autocast'": training.autocast,
        "'grad_scaler'": training.grad_scaler,
        "'optimizer_in_backward'": training.optimizer_in_backward,
        "'keep_outputs'": training.keep_outputs,
    }
    for name, given in others.items():
        if given:
            raise UnsupportedError(f"a pipeline with {name} is not modelled yet: leave one out")
