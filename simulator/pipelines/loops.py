"""Lowering the step of a pipelined rank: parts in the schedule's order, and what torch's loop holds in between.

Source: torch 2.13 torch/distributed/pipelining/schedules.py `ScheduleGPipe._step_microbatches`,
`Schedule1F1B._step_microbatches`, `_PipelineScheduleRuntime._step_microbatches`; stage.py `PipelineStage`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs

from simulator.graph import Storage
from simulator.pipelines.gathering import with_gathering
from simulator.pipelines.pipeline import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    RESHARD,
    UNSHARD,
    Action,
    Pipeline,
    Turns,
)
from simulator.pipelines.stage_micro_batch import StageBackward
from simulator.pipelines.stage_parts import END, StageParts
from simulator.pipelines.stages import Gradients
from simulator.program import Node, Occurrence, Repeat, Seq

#: A storage of one optimizer step and, there, of one micro-batch.
Kept = tuple[Storage, int, int]
#: A variable of torch's: what it is, and of which stage and micro-batch where it has one of each.
Name = tuple[str, int, int]
#: Locals of the loop: what the last forward returned, and the gradient that is being sent.
OUTPUT, SENT = ("output", 0, 0), ("sent", 0, 0)
#: Lists of one entry for each micro-batch, which all go at once when the next step begins.
PILED = frozenset(("returned", "received.grad", "loss"))


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
