"""Lowering one micro-batch: forward, backward and, where checkpointed, recomputation, step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs

from simulator.autograd import Autograd
from simulator.graph import ForwardGraph, Op, Storage
from simulator.recorder import Recorder, Step
from simulator.roles import Phase, Role
from simulator.runtime import Job, Runtime, Turn


@attrs.define(eq=False)
class Region:
    """The ops of one checkpointed layer: their saved tensors are dropped and recomputed in backward.

    Non-reentrant checkpointing (torch/utils/checkpoint.py `_checkpoint_without_reentrant_generator`):
    the arguments live until the last saved tensor has been used, and recomputation stops early,
    at the last tensor that forward saved.
    """

    ops: list[Op]
    arguments: list[Storage]
    first_saver: Op
    last_saver: Op
    recomputed: dict[Storage, Storage] | None = None


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
        self._region_of = self._regions(job.plan.checkpoints)
        self._uses = self._count_uses()
        self.after_forward: AfterForward | None = None
        """How the last `forward` ended."""

    def forward(self, turn: Turn) -> list[Step]:
        """The steps of inputs and forward."""
        self._runtimes = [runtime.fork() for runtime in self._initial]
        self.recorder = self._job.recorder = Recorder()
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
        for region in self._region_of.values():
            region.recomputed = None
        self._runtimes = [runtime.fork() for runtime in after.runtimes]
        self.recorder.phase = Phase.BACKWARD
        for runtime in self._runtimes:
            runtime.begin_backward(turn)
        engine = self._autograd(self._runtimes)
        engine.run()
        if self.keep_outputs:
            self._release_outputs()
        assert self.graph.loss is not None
        for tensor in (*self.graph.inputs, *self.graph.held, self.graph.loss):
            self.recorder.release(tensor.storage)
        for gradient in engine.kept:
            self.recorder.release(gradient)
        return self.recorder.steps

    def _autograd(self, runtimes: Sequence[Runtime]) -> Autograd:
        return Autograd(
            self.graph,
            self.recorder,
            self._saved,
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
        recorder = self.recorder
        graph = self.graph
        held = {t.storage for t in (*graph.outputs, *graph.held)} | {graph.loss.storage if graph.loss else None}
        entered: set[int] = set()
        for index, op in enumerate(self.graph.ops):
            if self._runtimes:
                self._before(index, op)
            region = self._region_of.get(op)
            if region is not None and id(region) not in entered:
                entered.add(id(region))
                for storage in region.arguments:
                    recorder.retain(storage)
            self._run(op, self.graph.births(op), self._uses, held)
            use = self._use[op]
            for storage in use.reads:
                recorder.release(storage)
            for storage in use.holds:
                recorder.release(storage)
        if self.graph.outside is None:
            for runtime in self._runtimes:
                runtime.end_forward()

    def _before(self, index: int, op: Op) -> None:
        """Tell the runtimes that `op` comes, or that the model has returned."""
        for runtime in self._runtimes:
            if index == self.graph.outside:
                runtime.end_forward()
            if self.graph.outside is None or index < self.graph.outside:
                runtime.before_op(op)

    def _run(self, op: Op, births: list[Storage], uses: Mapping[Storage, int], held: set[Storage | None]) -> None:
        """Record `op`; each birth is then held once per use instead of by its maker."""
        recorder = self.recorder
        recorder.module, recorder.slot = op.module, op.slot
        if op.only_saved:  # a checkpointed forward saves nothing, so nothing is there
            births = [storage for storage in births if uses.get(storage)]
        recorder.run(op.name, births)
        for storage in births:
            recorder.hand_over(storage, uses.get(storage, 0) + (storage in held))

    def _release_outputs(self) -> None:
        for tensor in self.graph.outputs:
            self.recorder.release(tensor.storage)

    def _count_uses(self) -> dict[Storage, int]:
        """References that the edges of the graph stand for; a checkpointed op's saves do not count."""
        uses: dict[Storage, int] = {}
        for op in self.graph.ops:
            use = self._use[op]
            for storages in (use.reads, use.holds, () if op in self._region_of else use.saves):
                for storage in storages:
                    uses[storage] = uses.get(storage, 0) + 1
        return uses

    # checkpointing -------------------------------------------------------------------------------------------------

    def _regions(self, checkpoints: Mapping[int, int]) -> dict[Op, Region]:
        found: dict[int, list[Op]] = {}
        for op in self.graph.ops:
            number = None if op.slot is None else checkpoints.get(op.slot)
            if number is not None:
                found.setdefault(number, []).append(op)
        # a checkpoint in which autograd saves nothing, because all of it is frozen, is none
        saving = [ops for ops in found.values() if any(self._use[op].saves for op in ops)]
        return {op: region for ops in saving for region in [self._region(ops)] for op in ops}

    def _region(self, ops: list[Op]) -> Region:
        """A checkpoint of `ops`: what the first of its layers is called with is its argument, in any case."""
        slots = dict.fromkeys(op.slot for op in ops if op.slot is not None)
        made = {storage for op in ops for storage in self.graph.births(op)}
        arguments = dict.fromkeys(s for slot in slots for s in self.graph.arguments[slot] if s not in made)
        savers = [op for op in ops if self._use[op].saves]
        return Region(_until_last_save(ops, savers[-1]), list(arguments), savers[0], savers[-1])

    def _saved(self, op: Op) -> tuple[list[Storage], list[Storage]]:
        """What `op` saved, to be released when its backward node has ended, or as soon as its function returns."""
        region = self._region_of.get(op)
        if region is None or not self._use[op].saves:
            return self._use[op].saves, []
        if region.recomputed is None:
            self._recompute(region)
        assert region.recomputed is not None
        unpacked = [region.recomputed.get(storage, storage) for storage in self._use[op].saves]
        return (region.arguments if op is region.first_saver else []), unpacked

    def _recompute(self, region: Region) -> None:
        """Run the region's ops again into storages of their own; what is not saved dies where recomputation stops."""
        recorder = self.recorder
        module, slot = recorder.module, recorder.slot
        recorder.phase = Phase.RECOMPUTE
        copies = {s: _copy(s) for op in region.ops for s in self.graph.births(op)}
        region.recomputed = places = copies.copy()
        uses, leftover = self._recompute_uses(region, copies)
        for op in region.ops:
            self._save_again(op, places, copies)
            self._run(op, [copies[s] for s in self.graph.births(op)], uses, set())
            for storage in (*self._use[op].reads, *self._use[op].holds):
                if storage in copies:
                    recorder.release(copies[storage])
        if region.last_saver not in region.ops:
            self._save_again(region.last_saver, places, copies)
        for storage in leftover:
            recorder.release(storage)
        for runtime in self._runtimes:
            runtime.end_recomputation()
        recorder.phase = Phase.BACKWARD
        recorder.module, recorder.slot = module, slot

    def _save_again(self, op: Op, places: dict[Storage, Storage], copies: Mapping[Storage, Storage]) -> None:
        """Hold what `op` saves of what is not recomputed: of a weight, what it consists of at this moment.

        The pack hook detaches each tensor (torch/utils/checkpoint.py `_recomputation_hook`), so that a framework that
        lets go of a gathered weight after its module frees nothing. Otherwise autograd keeps the parameter itself,
        whose memory is exchanged.
        """
        self.recorder.module, self.recorder.slot = op.module, op.slot
        for runtime in self._runtimes:
            runtime.before_recomputed(op)
        for storage in self._use[op].saves:
            if storage not in copies:
                place = next((p for runtime in self._runtimes if (p := runtime.place_of(storage))), storage)
                places[storage] = place
                self.recorder.retain(place)

    def _recompute_uses(
        self, region: Region, copies: dict[Storage, Storage]
    ) -> tuple[dict[Storage, int], list[Storage]]:
        """References to the copies, and those that outlive the last op run (frames unwound, casts of autocast)."""
        uses: dict[Storage, int] = {}
        run = set(region.ops)
        leftover = [copies[s] for s in copies if s.cached_by_autocast]
        for op in (op for op, own in self._region_of.items() if own is region):
            found = [*self._use[op].saves, *self._use[op].holds, *(self._use[op].reads if op in run else [])]
            leftover += [copies[s] for s in self._use[op].holds if s in copies and op not in run]
            for storage in found:
                if storage in copies:
                    uses[copies[storage]] = uses.get(copies[storage], 0) + 1
        for storage in copies:
            if storage.cached_by_autocast:
                uses[copies[storage]] = uses.get(copies[storage], 0) + 1
        return uses, leftover


def _until_last_save(ops: list[Op], last: Op) -> list[Op]:
    """Recomputation stops at the last saved tensor: before its op if it is an input, after it if an output."""
    return ops[: ops.index(last) + (1 if last.saves_late else 0)]


def _copy(storage: Storage) -> Storage:
    return attrs.evolve(storage, label=f"recompute.{storage.label}", role=Role.RECOMPUTE)
