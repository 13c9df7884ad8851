"""What a simulation found: peaks of the cold and the steady step, where they are and what they are made of."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import attrs

from simulator.fold import Folder, Location, Peak, Top
from simulator.host import HostMemory, saved_on_host, total
from simulator.lowering import TrainingProgram
from simulator.model import ModelSpec
from simulator.plan import Plan
from simulator.program import Identity, Node
from simulator.roles import Phase, Role
from simulator.timeline import Live, Timeline, layer_at, live_at, timeline
from simulator.workload import Training


@attrs.frozen
class StepPeak:
    """The peak of one optimizer step.

    Bytes are allocated tensor bytes: each storage rounded up to 512 B, memory inside kernels left out.
    """

    step: str
    """``cold`` (the first: optimizer state is created in it) or ``steady``."""
    nbytes: int
    phase: Phase
    op: str
    module: str
    by_role: dict[Role, int]
    start_bytes: int
    """Allocated when the step begins."""
    end_bytes: int
    """Allocated when it has ended."""
    location: Location = attrs.field(repr=False, eq=False)


class Report:
    """The result of `simulate`."""

    def __init__(self, plan: Plan, program: TrainingProgram, folding: Folding | None = None) -> None:
        self.plan = plan
        self.program = program
        self.cold, self.steady = (folding or Folding()).step_peaks(program)

    @property
    def model(self) -> ModelSpec:
        """The model that was simulated."""
        return self.plan.model

    @property
    def whole_model(self) -> ModelSpec:
        """The model of which a rank of a pipeline has a part."""
        return self.plan.model if self.plan.pipeline is None else self.plan.pipeline.whole

    @property
    def training(self) -> Training:
        """The workload that was simulated."""
        return self.plan.training

    @property
    def peak(self) -> StepPeak:
        """The higher of the two steps' peaks; the steady one on a tie."""
        return max(self.steady, self.cold, key=lambda step: step.nbytes)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the whole model, each tied weight once."""
        return count_parameters(self.plan)

    @cached_property
    def predictor_parameters(self) -> int:
        """Those in modules that predict further tokens, which share embeddings and head with the model."""
        depth, bindings = self.plan.model.depth, self.plan.dimensions.bindings
        theirs = {slot for slot, place in enumerate(self.plan.layout.places) if place.base + place.offset >= depth}
        weights = [tensor.storage for tensor in self.plan.graph.parameters if tensor.storage.slot in theirs]
        return sum(weight.size.elements(bindings) for weight in weights)

    @cached_property
    def host(self) -> HostMemory:
        """What a rank keeps beside its device: what strategies offload, and offloaded checkpoints, which are pinned."""
        hosts = [getattr(hooks, "host", None) for hooks in self.plan.hooks]
        parts = [host(self.plan) for host in hosts if host is not None]
        return total([HostMemory(pinned=self.host_bytes), saved_on_host(self.plan), *parts])

    @cached_property
    def host_bytes(self) -> int:
        """What offloaded checkpoints keep in host memory when backward begins: their tensors, as they are."""
        plan = self.plan
        if not plan.offloaded:
            return 0
        graph, places = plan.graph, plan.layout.places
        inputs = {slot: graph.arguments[slot][: graph.positional[slot]] for slot in plan.checkpoints}
        sizes = [
            (s.size.nbytes(plan.dimensions.bindings), places[slot].repeats) for slot in inputs for s in inputs[slot]
        ]
        return sum(nbytes * repeats for nbytes, repeats in sizes)

    def layer_of(self, step: StepPeak | None = None) -> int | None:
        """Index, in the whole model, of the layer in which a peak (by default the highest) is; None outside them."""
        step = step or self.peak
        node = self.program.steady if step.step == "steady" else self.program.cold
        layer = layer_at(node, step.location)
        return layer if layer is None or self.plan.pipeline is None else self.plan.pipeline.layers[layer]

    def live(self, step: StepPeak | None = None) -> list[Live]:
        """The storages alive at a peak (by default the highest), largest first; layers as the whole model counts."""
        step = step or self.peak
        before: list[Node] = [self.program.load]
        if step.step == "steady":
            before.append(self.program.cold)
        node = self.program.steady if step.step == "steady" else self.program.cold
        found = live_at(before, node, step.location, self.program.bindings)
        if self.plan.pipeline is None:
            return found
        layers = self.plan.pipeline.layers
        return [attrs.evolve(each, identity=_renumbered(each.identity, layers)) for each in found]

    def timeline(self, micro_batches: int | None = 2) -> Timeline:
        """Live bytes by role, step after step, of loading, the cold and the steady step.

        Args:
            micro_batches: how many of the later micro-batches to unroll (they are all alike); None for all.
        """
        parts = {"load": self.program.load, "cold": self.program.cold, "steady": self.program.steady}
        return timeline(parts, self.program.bindings, micro_batches)


def _renumbered(identity: Identity, layers: Sequence[int]) -> Identity:
    label, layer = identity
    return label, None if layer is None else layers[layer]


def count_parameters(plan: Plan) -> int:
    """Parameters of the whole model: built layers count once per layer they stand for."""
    if plan.pipeline is not None:
        plan = attrs.evolve(plan, model=plan.pipeline.whole, layer_kinds=(), pipeline=None)
    bindings, places = plan.dimensions.bindings, plan.layout.places
    total = 0
    for tensor in plan.graph.parameters:
        slot = tensor.storage.slot
        size = tensor.storage.whole or tensor.storage.size
        total += size.elements(bindings) * (1 if slot is None else places[slot].repeats)
    return total


class Folding:
    """Folds programs that have parts in common, each part once."""

    def __init__(self) -> None:
        self._folder = Folder()
        self._known: dict[int, Top] = {}

    def step_peaks(self, program: TrainingProgram) -> tuple[StepPeak, StepPeak]:
        """The peaks of the cold and the steady step; all programs must have the same sizes."""
        folder, known = self._folder, self._known
        for node in (program.load, program.cold, program.steady):
            folder.fold(node)  # so that the forms below share one set of columns
        load = folder.fold(program.load)
        cold = folder.fold(program.cold).after(load.net)
        steady = folder.fold(program.steady).after(cold.net)
        prices = steady.prices(program.bindings)
        before, between, after = (folded.left(prices) for folded in (load, cold, steady))
        first = _step_peak("cold", cold.peak(prices, known), before, between)
        return first, _step_peak("steady", steady.peak(prices, known), between, after)


def _step_peak(name: str, peak: Peak, start: int, end: int) -> StepPeak:
    at = peak.location.step
    return StepPeak(name, peak.nbytes, at.phase, at.name, at.module, peak.by_role, start, end, peak.location)
