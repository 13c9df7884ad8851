"""Lowering the micro-batches of stages in which frameworks act, in the loops of torch.distributed.pipelining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import attrs

from simulator.autograd import Autograd
from simulator.graph import Storage
from simulator.micro_batch import AfterForward
from simulator.pipelines.split_backward import InputBackward, Split, WeightBackward
from simulator.pipelines.stage_micro_batch import StageBackward, StageForward, StageMicroBatch
from simulator.recorder import Recorder, Step
from simulator.roles import Phase
from simulator.runtime import Job, Runtime, Turn

Part = TypeVar("Part", InputBackward, WeightBackward)
#: Whether a stage has gradients that a framework has put by, whether its weights have some, and some in buckets.
Gradients = tuple[bool, bool, bool]


class TorchStages(StageMicroBatch):
    """Lowers the parts of every stage of a rank, each from the state that frameworks and gradients are in then.

    Source: torch 2.13 torch/distributed/pipelining/stage.py `forward_one_chunk`, `backward_one_chunk`.

    Args:
        job: the rank.
        runtimes: of each stage, what frameworks do inside it.
    """

    def __init__(self, job: Job, runtimes: Sequence[Sequence[Runtime]] = ()) -> None:
        super().__init__(job)
        stages = range(len(job.graph.stages))
        self._initially: list[Sequence[Runtime]] = [runtimes[number] if runtimes else () for number in stages]
        self._between: dict[int, Sequence[Runtime]] = {}
        """What frameworks hold between the micro-batches of each stage, from its first forward of a step on."""
        self.gradients = [each[0].job.gradients if each else {} for each in self._initially]
        """Of each stage, parameters and their gradients."""
        self._known: dict[tuple[int, Gradients], list[dict[Storage, Storage]]] = {}

    # gradients -----------------------------------------------------------------------------------------------------

    def begin_with(self, number: int, state: Gradients) -> None:
        """Gradients of stage `number` as they were when they were first in that state."""
        known = self._known.get((number, state))
        if known is None:
            known = self._known[number, state] = [{} for _ in self._kept_gradients(number)]
            assert not any(state), "no part has left such gradients yet"
        for now, before in zip(self._kept_gradients(number), known, strict=True):
            now.clear()
            now.update(before)

    def state_of(self, number: int) -> Gradients:
        """Which gradients the last part has left; they are named for their parameters, whichever part made them."""
        own, *put_by = self._kept_gradients(number)
        for parameter, gradient in own.items():
            if not gradient.persistent:
                gradient.label = f"{parameter.label}.gradient"
        in_buckets = [gradient.persistent for gradient in own.values()]
        state = any(put_by), not all(in_buckets), any(in_buckets)
        self._known.setdefault((number, state), [dict(each) for each in (own, *put_by)])
        return state

    def _kept_gradients(self, number: int) -> list[dict[Storage, Storage]]:
        return [self.gradients[number], *(runtime.put_by() for runtime in self._initially[number])]

    # micro-batches -------------------------------------------------------------------------------------------------

    def forward_stage(self, number: int, *, first: bool = True) -> StageForward:
        """The steps of forward through the rank's stage `number`; the `first` of a step, or a later one."""
        stage = self.graph.stages[number]
        self.recorder = self._job.recorder = Recorder()
        self.recorder.phase = Phase.FORWARD
        given = self._initially[number] if number not in self._between else self._between[number]
        self._runtimes = [runtime.fork() for runtime in (self._initially[number] if first else given)]
        for runtime in self._runtimes:
            runtime.begin_forward(Turn(cold=False, first=first, last=False))
        self._run_model(stage)
        if stage.loss_op is None:
            for runtime in self._runtimes:
                runtime.end_forward()
        count = len(self.recorder.steps)
        self._run_loss(stage)
        steps = self.recorder.steps
        self._between.setdefault(number, self._runtimes)
        return StageForward(steps[:count], steps[count:], AfterForward(self.recorder, self._runtimes))

    def backward_stage(self, number: int, after: AfterForward, *, last: bool = False) -> StageBackward:
        """The steps of a full backward (`stage_backward`), from the loss or from the gradient that was received.

        Args:
            last: whether it is the last of a step through this stage.
        """
        self._go_on(after)
        for runtime in self._runtimes:
            runtime.begin_backward(Turn(cold=False, first=False, last=last))
        engine = Autograd(
            self.graph,
            self.recorder,
            self._checkpoints,
            self.gradients[number],
            runtimes=self._runtimes,
            **self._options,
        )
        self._run_engine(engine, self.graph.stages[number])
        for storage in self._checkpoints.bound():
            self.recorder.release(storage)
        return self._done(engine)

    def backward_input(self, number: int, after: AfterForward) -> StageBackward:
        """The steps of `stage_backward_input`."""
        self._go_on(after)
        for runtime in self._runtimes:
            runtime.begin_backward(Turn(cold=False, first=False, last=False))
        engine = self._split_engine(InputBackward, number, self._runtimes)
        self._run_engine(engine, self.graph.stages[number])
        engine.finish()
        return attrs.evolve(self._done(engine), captured=engine.captured)

    def backward_weight(self, number: int, first: StageBackward) -> StageBackward:
        """The steps of `stage_backward_weight`, after the `first` part."""
        self._go_on(first.after)
        engine = self._split_engine(WeightBackward, number)
        engine.run_groups(first.captured)
        return self._done(engine)

    def unshard_stage(self, number: int) -> Sequence[Step]:
        """What frameworks do when the schedule asks for the weights of a stage; its forwards find them there."""
        gathered = [runtime.fork() for runtime in self._initially[number]]
        self._between.setdefault(number, gathered)
        return self._outside(gathered, Runtime.unshard_stage.__name__)

    def reshard_stage(self, number: int) -> Sequence[Step]:
        """What they do when the schedule gives them back."""
        return self._outside([runtime.fork() for runtime in self._between[number]], Runtime.reshard_stage.__name__)

    def end_stage(self, number: int) -> Sequence[Step]:
        """What they do when all micro-batches went backward."""
        return self._outside([runtime.fork() for runtime in self._between[number]], Runtime.end_stage.__name__)

    def _outside(self, runtimes: Sequence[Runtime], moment: str) -> Sequence[Step]:
        """The steps of what frameworks do outside of any micro-batch."""
        self.recorder = self._job.recorder = Recorder()
        self.recorder.phase = Phase.FORWARD if moment == Runtime.unshard_stage.__name__ else Phase.BACKWARD
        for runtime in runtimes:
            getattr(runtime, moment)()
        return self.recorder.steps

    def _go_on(self, after: AfterForward) -> None:
        self.recorder = self._job.recorder = after.recorder.fork()
        self._runtimes = [runtime.fork() for runtime in after.runtimes]
        self._checkpoints.begin(self.recorder, self._runtimes)
        self.recorder.phase = Phase.BACKWARD

    def _split_engine(self, kind: type[Part], number: int, runtimes: Sequence[Runtime] = ()) -> Part:
        split = Split(self.graph, self.graph.stages[number])
        return kind(
            split,
            self.graph,
            self.recorder,
            self._checkpoints,
            self.gradients[number],
            runtimes=runtimes,
            **self._options,
        )

    @property
    def _options(self) -> dict[str, bool]:
        return {"kernel_workspace": self._job.plan.training.kernel_workspace}
