"""A plan: one training run before it is lowered. Strategies map one plan to the next and never change it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Protocol

import attrs

from hardware.dtypes import DType
from simulator.combinations import check_built, check_combination
from simulator.context_parallel import ContextParallelism
from simulator.families import families
from simulator.fusion import compile_layers
from simulator.graph import ForwardGraph
from simulator.layout import Layout, Sharing, layout_by_kind, layout_of, numbered, unrolled_layout
from simulator.mesh import Mesh
from simulator.model import ModelSpec
from simulator.pipelines.pipeline import MICRO_BATCHES, Pipeline
from simulator.runtime import Hooks
from simulator.sizes import Dimensions
from simulator.tensor_parallel import TensorParallelism
from simulator.trace import Regime, Trace
from simulator.workload import Training

#: The axis that ``dp_shard`` and ``cp`` make together (torchtitan/distributed/parallel_dims.py ``fsdp``).
FULLY_SHARDED = "dp_shard_cp"
#: The dimension that counts the trainable tensors of the whole model.
TRAINABLE_TENSORS = "tensors"


@attrs.frozen(eq=False)
class Plan:
    """What `lower` turns into a program: a description, from which layout and forward graph follow on demand."""

    model: ModelSpec
    training: Training
    mesh: Mesh = Mesh()
    """Degrees of parallelism; every axis is a dimension that sizes may name."""
    rank: int = 0
    """The data-parallel rank that is simulated, where ranks differ."""
    compute: DType | None = None
    """Element type that a framework casts the weights to for forward and backward; None keeps their own."""
    cast_inputs: bool = False
    """Whether it casts the floating-point arguments of each layer, too."""
    tensor_parallel: TensorParallelism | None = None
    """What is sharded along the mesh axis ``tp``."""
    context_parallel: ContextParallelism | None = None
    """How attention sees whole sequences, of which each rank along ``cp`` has a part."""
    scaled_loss: bool = False
    """Whether a framework's engine divides the loss by the number of micro-batches and scales it, always."""
    memory_efficient_linear: bool = False
    """Whether a framework's own ``linear`` runs instead of torch's: its backward takes the weight as it is then."""
    float8: str | None = None
    """How linear layers that run on float8 copies are scaled; None where none do."""
    compiled: bool = False
    """Whether each layer is compiled by itself: an approximation."""
    recomputed: frozenset[int] = frozenset()
    """Saved-set policy: the layers whose saved tensors are dropped and recomputed in backward."""
    reentrant: bool = False
    """Whether checkpoints are reentrant: a backward of their own inside that of the whole graph."""
    recomputed_modules: frozenset[str] = frozenset()
    """Modules, or parts of modules, of those layers that are checkpoints of their own; nothing means whole layers."""
    offloaded: bool = False
    """Whether the inputs that checkpoints keep are in host memory."""
    saved_on_host: str = ""
    """Which host memory all that autograd saves waits in, weights too: ``pinned`` or ``pageable``; empty for none."""
    pipeline: Pipeline | None = None
    """The part of a pipeline that the rank is; `model` has its layers only."""
    together: int = 1
    """How many consecutive layers, counted from the first, are one checkpoint."""
    kept_ops: frozenset[str] = frozenset()
    """Ops whose outputs checkpoints keep instead of running them again (selective activation checkpointing)."""
    alternate_op: str | None = None
    """The one of them of which every second is run again all the same."""
    frozen: frozenset[str] = frozenset()
    """Labels of the weights that need no gradient, in every layer that has them."""
    frozen_layers: int = 0
    """How many layers, from the first, have no weight that needs a gradient."""
    hooks: tuple[Hooks, ...] = ()
    """What frameworks do around the model, in order."""
    layer_kinds: tuple[Hashable, ...] = ()
    """What tells layers apart besides their specs (how full a bucket is when backward enters each): one per layer."""
    reach: int = 1
    """How many layers away a hook of one layer may act (prefetching)."""
    sharing: Sharing = Sharing.ALL
    """For which layers one that is built may stand; `lower` falls back to those before it."""
    unrolled: bool = False
    """Build every layer: slow, to check against."""
    applied: tuple[str, ...] = ()
    """Names of the strategies applied so far, in order."""
    assumptions: tuple[str, ...] = ()
    """One line for each default that a strategy filled in."""

    @property
    def sequence(self) -> int:
        """The tokens of each sequence that a rank has."""
        return self.training.seq_len // (self.mesh.cp if self.context_parallel else 1)

    @cached_property
    def layout(self) -> Layout:
        """Which layers are built: those that stand for all."""
        layers, others = numbered(self.model.layers), self.layer_kinds or (None,) * len(self.model.layers)
        kinds = [
            (layer, index in self.recomputed, index < self.frozen_layers, other)
            for index, (layer, other) in enumerate(zip(layers, others, strict=True))
        ]
        if self.unrolled:
            return unrolled_layout(kinds)
        if self.sharing is Sharing.TURNS or self._looks_around:
            return layout_of(kinds, self.reach, self.together)
        return layout_by_kind(kinds, self.sharing)

    @property
    def _looks_around(self) -> bool:
        """Whether what runs in a layer may depend on which layers are around it, or on how many went before."""
        between = self.hooks or self.layer_kinds or self.together > 1 or self.alternate_op
        on_host = self.offloaded or self.saved_on_host
        loops = self.model.load_balancing or self.model.depth < len(self.model.layers)
        return bool(between or loops or on_host or self.reentrant or self.pipeline or self._steps_in_backward)

    @property
    def _steps_in_backward(self) -> bool:
        """Whether something acts on weights while backward goes over the layers."""
        return self.training.optimizer_in_backward or self.training.grad_scaler

    @property
    def graph(self) -> ForwardGraph:
        """The forward graph of one micro-batch: what is computed and kept."""
        return self._trace.graph

    @property
    def dimensions(self) -> Dimensions:
        """The dimension table: every name that a size may use."""
        return self._trace.dimensions

    @cached_property
    def checkpoints(self) -> dict[int, int]:
        """Built slots of the layers that are recomputed, each with the number of the checkpoint it is part of."""
        layers = {slot: place.base + place.offset for slot, place in enumerate(self.layout.places)}
        return {slot: layer // self.together for slot, layer in layers.items() if layer in self.recomputed}

    @cached_property
    def _trace(self) -> Trace:
        check_combination(self)
        model, training = self.model, self.training
        values = {"b": training.micro_batch, "s": self.sequence, "h": model.hidden, "V": model.vocab}
        trace = Trace(_regime(self), Dimensions(values), _is_frozen(self))
        for axis, degree in self.mesh.degrees.items():
            trace.dim(axis, degree)
        trace.dim(FULLY_SHARDED, self.mesh.dp_shard_cp)
        recipe = families.get(model.family).recipe(training.implementation)
        if self.pipeline is None:
            recipe(trace, model, self.layout.built(model.layers))
        else:
            self._build_stages(trace, self.pipeline, recipe)
        trace.end_autocast()
        check_built(self, trace)
        if self.compiled:
            compile_layers(trace)
        trace.dim(TRAINABLE_TENSORS, _trainable_tensors(trace.graph, self.layout))
        return trace

    def _build_stages(self, trace: Trace, pipeline: Pipeline, recipe: Callable[..., object]) -> None:
        """The stages of the rank, each with the layers that are its own."""
        trace.dim(MICRO_BATCHES, self.training.gradient_accumulation)
        layers = self.layout.built(self.model.layers)
        for index in range(len(pipeline.chunks)):
            name = f"chunk{index}" if len(pipeline.chunks) > 1 else ""
            own = [(slot, layer) for slot, layer in layers if self._chunk_of(slot) == index]
            with trace.pipeline_stage(pipeline.stage_of(index), name):
                recipe(trace, self.model, own)

    def _chunk_of(self, slot: int) -> Hashable:
        place = self.layout.places[slot]
        return self.layer_kinds[place.base + place.offset]


@attrs.frozen
class RankClass:
    """Ranks whose programs are equal: simulating one of them tells of all."""

    name: str
    count: int
    rank: int
    """The data-parallel rank to simulate for them."""

    @classmethod
    def of(cls, ranks: Sequence[int], each: int = 1) -> RankClass:
        """A class of data-parallel `ranks`, every one of which stands for `each` ranks of the mesh."""
        starts = [rank for rank in ranks if rank - 1 not in ranks]
        ends = [rank for rank in ranks if rank + 1 not in ranks]
        parts = [f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]
        return cls(f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}", each * len(ranks), ranks[0])


def rank_classes(plan: Plan) -> list[RankClass]:
    """The classes of ranks of `plan`, the one that keeps the most first.

    Ranks are alike but for padding, of which rank 0 is simulated, having the largest share; unless one of the
    plan's hooks has a method `rank_classes` that tells them apart, or ranks along ``cp`` differ.
    """
    for hooks in plan.hooks:
        classes: Callable[[Plan], list[RankClass]] | None = getattr(hooks, "rank_classes", None)
        if classes is not None:
            return classes(plan)
    world = plan.mesh.world
    if plan.context_parallel is not None and plan.context_parallel.uneven:
        others = world // plan.mesh.cp
        return [RankClass(f"rank {rank} of cp", others, rank) for rank in reversed(range(plan.mesh.cp))]
    return [RankClass(f"all {world} ranks" if world > 1 else "the one device", world, plan.rank)]


class Strategy(Protocol):
    """One technique: a plan in, another plan out (docs/extending.md).

    One that uses the ranks of a mesh axis names it in a class attribute `axis`.
    """

    @property
    def name(self) -> str:
        """The name under which users ask for it."""
        ...

    def __call__(self, plan: Plan) -> Plan:
        """The plan with this technique applied; `UnsupportedError` with the reason where it cannot be."""
        ...


def make_plan(
    model: ModelSpec, training: Training, *, mesh: Mesh | None = None, rank: int = 0, unrolled: bool = False
) -> Plan:
    """The plan of a run without any strategy: everything on one device, everything saved.

    Args:
        mesh: degrees of parallelism that strategies may use; by default one device.
        rank: the data-parallel rank to simulate, where ranks differ.
        unrolled: build every layer; by default one of each kind, or three turns of a pattern.

    Raises:
        UnsupportedError: a workload that the model's recipe cannot build.
    """
    assumptions: tuple[str, ...] = ()
    if training.mtp:
        model = model.with_predictors(training.mtp)
        assumptions = (
            f"mtp {training.mtp}: each module is two norms, a projection, a layer of the last one's kind and a norm; "
            "embeddings and head are the model's own, which a published checkpoint may store, and count, once more",
        )
    return Plan(model, training, mesh or Mesh(), rank, unrolled=unrolled, assumptions=assumptions)


def _hooks_embeddings(plan: Plan) -> bool:
    """Transformers' own checkpointing, of single layers, asks for the gradient of the embedded tokens."""
    return (
        plan.training.implementation == "transformers"
        and bool(plan.recomputed)
        and plan.together == 1
        and not plan.recomputed_modules
    )


def _is_frozen(plan: Plan) -> Callable[[str, int | None], bool]:
    """Whether a weight, given its label and its layer's slot, needs no gradient."""
    slots = {s for s, place in enumerate(plan.layout.places) if place.base + place.offset < plan.frozen_layers}
    return lambda label, slot: slot in slots or label in plan.frozen


def _trainable_tensors(graph: ForwardGraph, layout: Layout) -> int:
    slots = [t.storage.slot for t in graph.parameters if t.requires_grad]
    return sum(1 if slot is None else layout.places[slot].repeats for slot in slots)


def apply(plan: Plan, strategies: Sequence[Strategy]) -> Plan:
    """`plan` after every strategy in turn."""
    for strategy in strategies:
        plan = strategy(plan)
        plan = attrs.evolve(plan, applied=(*plan.applied, strategy.name))
    return plan


def _regime(plan: Plan) -> Regime:
    training = plan.training
    return Regime(
        weights=plan.compute or training.weights,
        autocast=training.autocast,
        attention=training.attention,
        sdpa_backend=training.sdpa_backend,
        experts=training.experts,
        imbalance=training.expert_imbalance,
        capacity_factor=training.capacity_factor,
        expert_parallel=plan.mesh.ep,
        torch=training.torch,
        attention_mask=training.attention_mask,
        fused_activation_backward=training.fused_activation_backward,
        fused_norm=training.fused_norm,
        tensor_subclasses=training.tensor_subclasses,
        implementation=training.implementation,
        loss=training.loss,
        # a pipeline divides the gradients instead, in place (schedules.py `scale_grads`)
        loss_division=training.gradient_accumulation > 1
        and not (plan.scaled_loss or training.items_in_batch or plan.pipeline),
        scaled_loss=plan.scaled_loss,
        keep_inputs=training.keep_inputs,
        any_sdpa_backend=training.any_sdpa_backend,
        cast_inputs=plan.cast_inputs,
        tensor_parallel=plan.tensor_parallel,
        context_parallel=plan.context_parallel,
        liger=training.liger,
        items_in_batch=training.items_in_batch,
        memory_efficient_linear=plan.memory_efficient_linear,
        embeddings_require_grad=_hooks_embeddings(plan),
        float8=plan.float8,
        pipelined=plan.pipeline is not None,
    )
