"""Megatron-LM's pipeline parallelism: 1F1B, interleaved where a rank has several chunks of the model.

Technique: Narayanan et al., PipeDream-Flush, arXiv:2006.09503, and interleaved stages, arXiv:2104.04473.
Behaviour: megatron-core 0.16 megatron/core/pipeline_parallel/schedules.py and p2p_communication.py; the defaults are
those of megatron/training/arguments.py.
"""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.pipelines.pipeline import Action, MegatronLoop
from simulator.plan import Plan
from simulator.schedules import schedule
from simulator.schedules.in_flight import InFlight, in_flight
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Kind, flat
from simulator.workload import MEGATRON
from strategies.pipeline import PipelineParallel


@attrs.frozen(kw_only=True)
class MegatronPipeline:
    """One rank of Megatron's pipeline over mesh axis ``pp``; ``gradient_accumulation`` counts the micro-batches.

    Args:
        rank: of the pipeline, from 0 on.
        chunks: of the model that each rank has, which take turns (virtual pipeline stages).
        group: micro-batches that run through one chunk before the next (``microbatch_group_size_per_vp_stage``); 0 is
            one for each rank.
        split: layers of each stage; None for equal ones.
        overlap_p2p_comm: whether sends and receives of interleaved chunks overlap with computation.
        deallocate_pipeline_outputs: whether an output that was sent keeps one element only.
    """

    rank: int = 0
    chunks: int = 1
    group: int = 0
    split: tuple[int, ...] | None = None
    overlap_p2p_comm: bool = True
    deallocate_pipeline_outputs: bool = True
    name: str = attrs.field(default="megatron_pipeline", init=False)
    axis: ClassVar[str] = "pp"

    @property
    def known_as(self) -> str:
        """The name under which the schedule is registered."""
        return "interleaved_1f1b" if self.chunks > 1 else "1f1b"

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the rank's own layers; of tied embeddings the last stage has a copy.

        Raises:
            UnsupportedError: an implementation that is not Megatron's.
            UsageError: layers that do not make stages, or numbers without a schedule.
        """
        if plan.training.implementation not in MEGATRON:
            raise UnsupportedError(
                f"{self.name} of implementation {plan.training.implementation!r} is not modelled: use pipeline"
            )
        made = self.made_for(plan.mesh.pp, plan.training.gradient_accumulation)
        if not 0 <= self.rank < made.pp:
            raise UsageError(f"'rank' must be from 0 to {made.pp - 1}, the ranks of the pipeline: {self.rank}")
        order = tuple(Action(Kind(int(k)).name, int(m), int(c)) for k, c, m, _ in flat(made.tree(self.rank)))
        cut = PipelineParallel(
            cuts=self.cuts(len(plan.model.layers), made.stages),
            stages=tuple(made.stage(self.rank, chunk) for chunk in range(self.chunks)),
            order=order,
        )
        parts = cut(attrs.evolve(plan, model=attrs.evolve(plan.model, tied_embeddings=False)))
        assert parts.pipeline is not None
        loop = MegatronLoop(
            order=order,
            chunks=self.chunks,
            rank=self.rank,
            ranks=made.pp,
            group=made.group,
            overlap_p2p_comm=self.overlap_p2p_comm,
            deallocate_pipeline_outputs=self.deallocate_pipeline_outputs,
        )
        return attrs.evolve(parts, pipeline=attrs.evolve(parts.pipeline, whole=plan.model, megatron=loop))

    def made_for(self, pp: int, micro_batches: int) -> Schedule:
        """The schedule of `pp` ranks.

        Raises:
            UsageError: numbers for which it is not defined.
        """
        if pp < 2:
            raise UsageError(f"'pp' must be at least 2 for {self.name}: {pp}; leave the pipeline out")
        group = self.group or None if self.chunks > 1 else None
        return schedule(self.known_as, pp, micro_batches, self.chunks, group)

    def cuts(self, layers: int, stages: int) -> tuple[int, ...]:
        """The first layer of each of `stages`, and the number of `layers`."""
        if self.split is None:
            if layers % stages:
                way = "take another degree, or say --pp-split"
                raise UsageError(f"'pp': {layers} layers do not make {stages} equal stages; {way}")
            return tuple(range(0, layers + 1, layers // stages))
        if len(self.split) != stages or sum(self.split) != layers:
            numbers = ",".join(map(str, self.split))
            raise UsageError(f"'pp-split' must be {stages} numbers of layers that add up to {layers}: {numbers}")
        return (0, *accumulate(self.split))

    def in_flight(self, pp: int, micro_batches: int) -> InFlight:
        """What the rank holds at once, in micro-batches."""
        return in_flight(self.made_for(pp, micro_batches), self.rank)
