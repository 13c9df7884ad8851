"""What the stages of a rank run, lowered once: forwards, backwards, and what frameworks do outside of them.

Source: torch 2.13 torch/distributed/pipelining/stage.py `PipelineStage`.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from simulator.graph import Storage, Tensor
from simulator.pipelines.pipeline import (
    BACKWARD,
    BACKWARD_WEIGHT,
    MICRO_BATCHES,
    RESHARD,
    UNSHARD,
)
from simulator.pipelines.stage_micro_batch import ForwardNodes, StageBackward
from simulator.pipelines.stages import Gradients, TorchStages
from simulator.program import Node, Repeat, TreeBuilder
from simulator.recorder import Step
from simulator.roles import Phase, Role
from simulator.runtime import Job, Runtime, buffer
from simulator.sizes import size_of

#: All micro-batches went backward through a stage.
END = "end"


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
        self._micro_batch = TorchStages(job, runtimes)
        self.shards_stages = any(runtime.shards_stages for runtime in every)
        """Whether frameworks gather the weights of a stage, and may be told when."""
        self._first_differs = bool(every)
        self._last_differs = any(runtime.last_differs for runtime in every)
        self._forwards: dict[tuple[int, bool], ForwardNodes] = {}
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

    def forward(self, number: int, *, first: bool) -> ForwardNodes:
        """The forward of stage `number` of the rank; the `first` of a step, or a later one."""
        key = number, first or not self._first_differs
        if key not in self._forwards:
            recorded = self._micro_batch.forward_stage(number, first=key[1])
            self._forwards[key] = ForwardNodes.of(recorded, self._builder)
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
