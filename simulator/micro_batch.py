"""Lowering one micro-batch: forward, backward and, where checkpointed, recomputation, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import attrs

from hardware.errors import UnsupportedError
from simulator.autograd import Autograd
from simulator.checkpoints import Checkpoints
from simulator.graph import ForwardGraph, Op, Storage
from simulator.hand_over import Unlike
from simulator.recorder import Recorder, Step
from simulator.roles import Phase
from simulator.runtime import Job, Runtime, Turn


@attrs.frozen(eq=False)
class AfterForward:
    """Where a backward goes on from: references and frameworks as the forward left them."""

    recorder: Recorder
    runtimes: Sequence[Runtime]


class MicroBatch:
    """Lowers the micro-batches of one forward graph: forward once, backward for each state of the gradients.

    Args:
        job: the forward graph, the workload and the gradients that exist.
        runtimes: what frameworks do around the model.
    """

    def __init__(self, job: Job, runtimes: Sequence[Runtime] = ()) -> None:
        self.graph: ForwardGraph = job.graph
        self.recorder = Recorder()
        self.keep_outputs = job.plan.training.keep_outputs
        self._job = job
        self._initial = self._runtimes = runtimes
        self._use = {op: self.graph.uses(op) for op in self.graph.ops}
        self._checkpoints = Checkpoints(job.plan, self._use)
        if runtimes and (job.plan.reentrant or job.plan.recomputed_modules):
            kind = "reentrant checkpoints" if job.plan.reentrant else "checkpoints of modules"
            raise UnsupportedError(
                f"{kind} under a framework's hooks are not modelled: use full_checkpointing as it is"
            )
        self._uses = self._count_uses()
        self.after_forward: AfterForward | None = None
        """How the last `forward` ended."""

    def forward(self, turn: Turn) -> list[Step]:
        """The steps of inputs and forward."""
        self._runtimes = [runtime.fork() for runtime in self._initial]
        self.recorder = self._job.recorder = Recorder(by_layer=not self._initial)
        self._begin()
        self.recorder.phase = Phase.FORWARD
        for runtime in self._runtimes:
            runtime.begin_forward(turn)
        self._forward()
        if not self.keep_outputs:
            self._release_outputs()
        self.after_forward = AfterForward(self.recorder, self._runtimes)
        return self.recorder.steps

    def backward(self, turn: Turn, after: AfterForward) -> list[Step]:
        """The steps of backward, to the end of the micro-batch, after a forward.

        Parameters that have a gradient in the job accumulate into it; the others get one there.
        """
        self.recorder = self._job.recorder = after.recorder.fork()
        self._runtimes = [runtime.fork() for runtime in after.runtimes]
        self._checkpoints.begin(self.recorder, self._runtimes)
        self.recorder.phase = Phase.BACKWARD
        for runtime in self._runtimes:
            runtime.begin_backward(turn)
        engine = self._autograd(self._runtimes)
        assert self.graph.loss is not None
        engine.run(self.graph.loss)
        if self._job.plan.layout.scattered and len(engine.entered_with) > 1:
            raise Unlike
        if self.keep_outputs:
            self._release_outputs()
        for tensor in (*self.graph.inputs, *self.graph.held, self.graph.loss):
            self.recorder.release(tensor.storage)
        for storage in (*engine.kept, *self._checkpoints.bound()):
            self.recorder.release(storage)
        return self.recorder.steps

    def _autograd(self, runtimes: Sequence[Runtime]) -> Autograd:
        return Autograd(
            self.graph,
            self.recorder,
            self._checkpoints,
            self._job.gradients,
            runtimes=runtimes,
            kernel_workspace=self._job.plan.training.kernel_workspace,
        )

    # forward -------------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.recorder.phase = Phase.INPUT
        for tensor in (t for t in self.graph.inputs if not t.storage.persistent):
            self.recorder.run(tensor.storage.label, [tensor.storage])
            self.recorder.retain(tensor.storage, self._uses.get(tensor.storage, 0))

    def _forward(self) -> None:
        graph = self.graph
        held = {t.storage for t in (*graph.outputs, *graph.held)} | {graph.loss.storage if graph.loss else None}
        self._run_ops(range(len(graph.ops)), held)
        if self.graph.outside is None:
            for runtime in self._runtimes:
                runtime.end_forward()

    def _run_ops(self, indices: range, held: set[Storage | None]) -> None:
        """Run some ops of the graph, after which the caller still has what is `held`."""
        recorder = self.recorder
        unborn: set[Storage] = set()
        for index in indices:
            op = self.graph.ops[index]
            if self._runtimes:
                self._before(index, op)
            region = self._checkpoints.region_of.get(op)
            if region is not None:
                if op is region.ops[0]:
                    for storage in (*region.arguments, *region.bound):
                        recorder.retain(storage)
                unborn.update(self._checkpoints.unborn(op))
            self._run(op, [s for s in self.graph.births(op) if s not in unborn], held)
            uses = self._use[op]
            for storage in (*uses.reads, *uses.holds):
                if storage not in unborn:
                    recorder.release(storage)

    def _before(self, index: int, op: Op) -> None:
        """Tell the runtimes that `op` comes, or that the model has returned."""
        for runtime in self._runtimes:
            if index == self.graph.outside:
                runtime.end_forward()
            if self.graph.outside is None or index < self.graph.outside:
                runtime.before_op(op)

    def _run(self, op: Op, births: list[Storage], held: set[Storage | None]) -> None:
        """Record `op`; each birth is then held once per use instead of by its maker."""
        recorder = self.recorder
        recorder.module, recorder.slot = op.module, op.place
        if op.only_saved and not self._checkpoints.on_host:  # a checkpointed forward saves nothing, so nothing is there
            births = [storage for storage in births if self._uses.get(storage)]
        recorder.run(op.name, births)
        for storage in births:
            recorder.hand_over(storage, self._uses.get(storage, 0) + (storage in held))

    def _release_outputs(self) -> None:
        if any(tensor.storage.slot is not None for tensor in self.graph.outputs):  # a step of all layers, not of one
            self.recorder.module, self.recorder.slot = "", None
            self.recorder.note("outputs")
        for tensor in self.graph.outputs:
            self.recorder.release(tensor.storage)

    def _count_uses(self) -> Counter[Storage]:
        """References that the edges of the graph stand for; a checkpointed op's saves do not count."""
        counted: list[Storage] = []
        for op in self.graph.ops:
            counted += self._use[op].reads
            counted += self._use[op].holds
            counted += self._checkpoints.saves(op)
            counted += self._checkpoints.kept(op)
        return Counter(counted)
