"""Checkpointed regions of a forward graph: what they keep, what backward runs again, and what holds what until when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from hardware.errors import UnsupportedError
from simulator.graph import ATTENTION_CORE, ForwardGraph, Op, Storage, Uses
from simulator.plan import Plan
from simulator.recorder import Recorder
from simulator.roles import Phase, Role
from simulator.runtime import Runtime
from simulator.sizes import size_of


@attrs.define(eq=False)
class Region:
    """The ops of one checkpoint: their saved tensors are dropped and recomputed in backward.

    Non-reentrant (torch/utils/checkpoint.py `_checkpoint_without_reentrant_generator`): the arguments live until the
    last saved tensor has been used, and recomputation stops early, at the last tensor that forward saved.
    Reentrant (`CheckpointFunction`): forward records nothing, backward runs all of it again and a backward inside it;
    positional arguments live until that has ended, what the function was bound to as long as the graph.
    """

    ops: list[Op]
    first: int
    """Index in the graph of its first op."""
    rerun: list[Op]
    """What is run again: all ops, or those before recomputation stops."""
    arguments: list[Storage]
    offloaded: list[Storage]
    """Arguments that are in host memory until the region is run again."""
    bound: list[Storage]
    """Of a reentrant checkpoint: what stays until the graph goes."""
    first_saver: Op
    last_saver: Op
    outputs: list[Storage]
    """What the ops after it read of what it makes."""
    kept: dict[Op, list[Storage]]
    """Ops whose outputs stay from forward, and those outputs."""
    recomputed: dict[Storage, Storage] | None = None


class Checkpoints:
    """The regions of a plan, and their recomputation.

    Args:
        use: why each op needs storages.
    """

    def __init__(self, plan: Plan, use: Mapping[Op, Uses]) -> None:
        self.reentrant = plan.reentrant
        self.on_host = bool(plan.saved_on_host)
        self.region_of: dict[Op, Region] = {}
        self._plan = plan
        self._graph: ForwardGraph = plan.graph
        self._use = use
        self._recorder = Recorder()
        self._runtimes: Sequence[Runtime] = ()
        for ops in self._find():
            # a checkpoint in which autograd saves nothing, because all of it is frozen, is none
            if any(self._use[op].saves for op in ops):
                self.region_of |= dict.fromkeys(ops, self._region(ops))
                self._check(ops)

    def _find(self) -> list[list[Op]]:
        """The ops of each checkpoint: those of a layer or of several, or the runs of ops of one module."""
        found: dict[tuple[object, ...], list[Op]] = {}
        before: Op | None = None
        run = 0
        for op in self._graph.ops:
            number = None if op.slot is None else self._plan.checkpoints.get(op.slot)
            module = self._module(op)
            run += before is not None and module != self._module(before)
            before = op
            if number is not None and module is not None:
                found.setdefault((number, module, run if module else 0), []).append(op)
        return list(found.values())

    def _module(self, op: Op) -> str | None:
        """The checkpointed module that `op` is in; "" where layers are checkpoints as a whole, None outside all."""
        if not self._plan.recomputed_modules:
            return ""
        names = op.module.split(".")
        inside = [i for i, name in enumerate(names) if name in self._plan.recomputed_modules]
        if inside:
            return ".".join(names[: inside[0] + 1])
        return op.part if op.part in self._plan.recomputed_modules else None

    def _called_with(self, ops: Sequence[Op]) -> list[Storage]:
        """The arguments of a checkpoint: what layers are called with, or what modules read from outside."""
        made = {storage for op in ops for storage in self._graph.births(op)}
        slots = dict.fromkeys(op.slot for op in ops if op.slot is not None)
        called = [storage for slot in slots for storage in self._graph.arguments[slot]]
        if self._plan.recomputed_modules:
            read = [s for op in ops for s in self._use[op].reads if s not in made]
            if any(op.part == ATTENTION_CORE for op in ops):  # layers hand on to attention what they are called with
                read += called[1:]
            return [s for s in dict.fromkeys(read) if not s.persistent and not s.cached_by_autocast]
        return list(dict.fromkeys(s for s in called if s not in made))

    def _check(self, ops: Sequence[Op]) -> None:
        """`UnsupportedError` where a reentrant checkpoint has no input through which a gradient reaches its weights."""
        made = {id(tensor) for op in ops for tensor in op.outputs}
        inputs = {t.storage for op in ops for t in op.inputs if t.requires_grad and id(t) not in made}
        if self.reentrant and all(storage.persistent for storage in inputs):
            rule = "an input that requires a gradient"
            raise UnsupportedError(
                f"a reentrant checkpoint needs {rule}: train the embeddings, or leave 'reentrant' out"
            )

    def begin(self, recorder: Recorder, runtimes: Sequence[Runtime]) -> None:
        """A backward begins: nothing is recomputed yet."""
        self._recorder, self._runtimes = recorder, runtimes
        for region in self.region_of.values():
            region.recomputed = None

    def nested(self, op: Op) -> Region | None:
        """The region whose own backward runs `op`'s, inside that of the whole graph."""
        return self.region_of.get(op) if self.reentrant else None

    def saves(self, op: Op) -> list[Storage]:
        """What forward keeps for the backward of `op`."""
        return [] if self.on_host or op in self.region_of else self._use[op].saves

    def kept(self, op: Op) -> list[Storage]:
        """What forward keeps of what `op` makes, instead of running it again."""
        region = self.region_of.get(op)
        return region.kept.get(op, []) if region is not None else []

    def unborn(self, op: Op) -> Iterable[Storage]:
        """What forward does not make of what `op` makes, because nothing is recorded."""
        return op.only_recorded if self.nested(op) else ()

    def bound(self) -> list[Storage]:
        """What checkpoints hold until the graph goes, once for each that does."""
        regions = dict.fromkeys(self.region_of.values())
        return [storage for region in regions for storage in region.bound]

    def saved(self, op: Op) -> tuple[list[Storage], list[Storage]]:
        """What `op` saved, to be released when its backward node has ended, or as soon as its function returns."""
        if self.on_host:
            return [], self._from_host(op)
        region = self.region_of.get(op)
        if region is None or not self._use[op].saves:
            return self._use[op].saves, []
        if region.recomputed is None:
            self.recompute(region)
        assert region.recomputed is not None
        unpacked = [region.recomputed.get(storage, storage) for storage in self._use[op].saves]
        if self.reentrant:
            return unpacked, []
        return (self._held_by_frame(region) if op is region.first_saver else []), unpacked

    def _from_host(self, op: Op) -> list[Storage]:
        """`save_on_cpu` (torch/autograd/graph.py): a copy of each tensor by itself, until the node's function returns.

        The node unpacks all of them before it does anything else (torch/csrc/autograd/generated/Functions.cpp).
        """
        copies = []
        for number, tensor in enumerate(op.packed):
            size, storage = size_of(tensor.dims, tensor.dtype.bits), tensor.storage
            role = Role.RECOMPUTE if not storage.persistent else Role.GATHERED
            label = f"from_host.{self._graph.ops.index(op)}.{storage.label}.{number}"
            copies.append(Storage(label, size, tensor.dtype, role, op.place))
            self._recorder.run("_to_copy.default", copies[-1:])
        return copies

    @staticmethod
    def _held_by_frame(region: Region) -> list[Storage]:
        """What goes with a checkpoint's last saved tensor: its arguments, and kept outputs that nobody asked for."""
        run = set(region.rerun)
        return [*region.arguments, *(s for op, outputs in region.kept.items() if op not in run for s in outputs)]

    def leave(self, region: Region) -> list[Storage]:
        """The backward inside a reentrant `region` has ended: its outputs go, and then what is returned here."""
        assert region.recomputed is not None
        for storage in region.outputs:
            self._recorder.release(region.recomputed[storage])
        return region.arguments

    def recompute(self, region: Region) -> None:
        """Run the region's ops again into storages of their own; what is not saved dies where recomputation stops."""
        recorder = self._recorder
        module, slot = recorder.module, recorder.slot
        recorder.phase = Phase.RECOMPUTE
        copies = {s: s if op in region.kept else _copy(s) for op in region.rerun for s in self._graph.births(op)}
        copies |= {s: attrs.evolve(s, label=f"from_host.{s.label}", role=Role.RECOMPUTE) for s in region.offloaded}
        region.recomputed = places = copies.copy()
        uses, leftover = self._recompute_uses(region, copies)
        self._fetch([copies[storage] for storage in region.offloaded], region.ops[0], uses)
        for op in region.rerun:
            self._save_again(op, places, copies)
            self._run(op, [copies[s] for s in self._graph.births(op)], uses, kept=op in region.kept)
            for storage in (*self._use[op].reads, *self._use[op].holds):
                if storage in copies:
                    recorder.release(copies[storage])
        if region.last_saver not in region.rerun:
            self._save_again(region.last_saver, places, copies)
        for storage in leftover:
            recorder.release(storage)
        for runtime in self._runtimes:
            runtime.end_recomputation()
        recorder.phase = Phase.BACKWARD
        recorder.module, recorder.slot = module, slot

    def _fetch(self, arguments: Sequence[Storage], first: Op, uses: Mapping[Storage, int]) -> None:
        """Copy offloaded arguments back (torch/autograd/graph.py `save_on_cpu`); the unpacking frame holds them."""
        self._recorder.module, self._recorder.slot = first.module, first.slot
        for storage in arguments:
            self._recorder.run("_to_copy.default", [storage])
            self._recorder.retain(storage, uses[storage])
            self._recorder.release(storage)

    def _run(self, op: Op, births: list[Storage], uses: Mapping[Storage, int], *, kept: bool) -> None:
        """Record `op` again, or take what was kept; each birth is then held once per use instead of by its maker."""
        self._recorder.module, self._recorder.slot = op.module, op.slot
        if op.only_saved:  # of what it makes, what recomputation does not reach to save is not there
            births = [storage for storage in births if uses.get(storage)]
        if not kept:
            self._recorder.run(op.name, births)
        for storage in births:
            self._recorder.retain(storage, uses.get(storage, 0))
            self._recorder.release(storage)

    def _save_again(self, op: Op, places: dict[Storage, Storage], copies: Mapping[Storage, Storage]) -> None:
        """Hold what `op` saves of what is not recomputed: of a weight, what it consists of at this moment.

        The pack hook detaches each tensor (torch/utils/checkpoint.py `_recomputation_hook`), so that a framework that
        lets go of a gathered weight after its module frees nothing. Otherwise autograd keeps the parameter itself,
        whose memory is exchanged.
        """
        self._recorder.module, self._recorder.slot = op.module, op.slot
        for runtime in self._runtimes:
            runtime.before_recomputed(op)
        for storage in self._use[op].saves:
            if storage not in copies:
                place = next((p for runtime in self._runtimes if (p := runtime.place_of(storage))), storage)
                places[storage] = place
                self._recorder.retain(place)

    def _recompute_uses(
        self, region: Region, copies: dict[Storage, Storage]
    ) -> tuple[dict[Storage, int], list[Storage]]:
        """References to the copies, and those that outlive the last op run (frames unwound, casts of autocast)."""
        uses: dict[Storage, int] = {}
        run = set(region.rerun)
        casts = [s for s in copies if s.cached_by_autocast]
        leftover = [copies[s] for s in (*casts, *region.offloaded)]
        kept = [*casts, *region.offloaded, *(region.outputs if self.reentrant else [])]
        for op in region.ops:
            kept += [*self._use[op].saves, *self._use[op].holds, *(self._use[op].reads if op in run else [])]
            leftover += [copies[s] for s in self._use[op].holds if s in copies and op not in run]
        for storage in kept:
            if storage in copies:
                uses[copies[storage]] = uses.get(copies[storage], 0) + 1
        return uses, leftover

    def _region(self, ops: list[Op]) -> Region:
        """A checkpoint of `ops`: what the first of its layers is called with is its argument, in any case."""
        graph = self._graph
        made = {storage for op in ops for storage in graph.births(op)}
        savers = [op for op in ops if self._use[op].saves]
        within = set(ops)
        read = {storage for op in graph.ops if op not in within for storage in self._use[op].reads}
        outputs = [storage for storage in made if storage in read]
        arguments = self._called_with(ops)
        positional = 1 if ops[0].slot is None else graph.positional[ops[0].slot]
        bound = arguments[positional:] if self.reentrant else []
        offloaded = arguments[:positional] if self._plan.offloaded else []
        return Region(
            ops=ops,
            first=graph.ops.index(ops[0]),
            rerun=ops if self.reentrant else _until_last_save(ops, savers[-1]),
            arguments=[storage for storage in arguments if storage not in (*bound, *offloaded)],
            offloaded=offloaded,
            bound=bound,
            first_saver=savers[0],
            last_saver=savers[-1],
            outputs=outputs,
            kept=self._kept(ops),
        )

    def _kept(self, ops: Sequence[Op]) -> dict[Op, list[Storage]]:
        """The outputs that stay (torch/utils/checkpoint.py `_CachingTorchDispatchMode`)."""
        found = {}
        seen = 0
        for op in ops:
            seen += op.name == self._plan.alternate_op
            recomputed = op.name == self._plan.alternate_op and seen % 2 == 0
            if op.name in self._plan.kept_ops and not recomputed:
                found[op] = self._graph.births(op)
        return found


def _until_last_save(ops: list[Op], last: Op) -> list[Op]:
    """Recomputation stops at the last saved tensor: before its op if it is an input, after it if an output."""
    return ops[: ops.index(last) + (1 if last.saves_late else 0)]


def _copy(storage: Storage) -> Storage:
    return attrs.evolve(storage, label=f"recompute.{storage.label}", role=Role.RECOMPUTE)
