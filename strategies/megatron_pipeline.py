"""Megatron-LM's pipeline parallelism: 1F1B, interleaved where a rank has several chunks of the model.

Technique: Narayanan et al., PipeDream-Flush, arXiv:2006.09503, and interleaved stages, arXiv:2104.04473.
Behaviour: megatron-core 0.16 megatron/core/pipeline_parallel/schedules.py and p2p_communication.py; the defaults are
those of megatron/training/arguments.py.
"""

from __future__ import annotations

from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.pipeline import Action, MegatronLoop
from simulator.plan import Plan
from simulator.schedules import schedule
from simulator.schedules.tree import Kind, flat
from simulator.workload import MEGATRON
from strategies.options import count, flag, option
from strategies.pipeline import PipelineParallel


@attrs.frozen(kw_only=True)
class MegatronPipeline:
    """One rank of Megatron's pipeline over mesh axis ``pp``; ``gradient_accumulation`` counts the micro-batches."""

    rank: int = option(0, count(0), "the pipeline rank that is simulated")
    chunks: int = option(1, count(1), "model chunks of a rank, which take turns (virtual pipeline stages)")
    group: int = option(
        0,
        count(0),
        "micro-batches that run through one chunk before the next; 0 is one for each rank",
        "microbatch_group_size_per_vp_stage in megatron/core/model_parallel_config.py",
    )
    overlap_p2p_comm: bool = option(True, flag, "sends and receives of interleaved chunks overlap with computation")
    deallocate_pipeline_outputs: bool = option(
        True, flag, "an output that was sent keeps one element (the config's default is false)"
    )
    name: str = attrs.field(default="megatron_pipeline", init=False)
    axis: ClassVar[str] = "pp"

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the rank's own layers; of tied embeddings the last stage has a copy.

        Raises:
            UnsupportedError: an implementation that is not Megatron's.
            UsageError: layers that do not make stages of equal size, or numbers without a schedule.
        """
        self._check(plan)
        ranks, micro_batches = plan.mesh.pp, plan.training.gradient_accumulation
        name = "interleaved_1f1b" if self.chunks > 1 else "1f1b"
        made = schedule(name, ranks, micro_batches, self.chunks, (self.group or None) if self.chunks > 1 else None)
        layers = len(plan.model.layers) // made.stages
        order = [Action(Kind(int(k)).name, int(m), int(c)) for k, c, m, _ in flat(made.tree(self.rank))]
        cut = PipelineParallel(
            cuts=tuple(range(0, len(plan.model.layers) + 1, layers)),
            stages=tuple(made.stage(self.rank, chunk) for chunk in range(self.chunks)),
            order=tuple(order),
        )
        parts = cut(attrs.evolve(plan, model=attrs.evolve(plan.model, tied_embeddings=False)))
        assert parts.pipeline is not None
        loop = MegatronLoop(
            order=tuple(order),
            chunks=self.chunks,
            rank=self.rank,
            ranks=ranks,
            group=made.group,
            overlap_p2p_comm=self.overlap_p2p_comm,
            deallocate_pipeline_outputs=self.deallocate_pipeline_outputs,
        )
        return attrs.evolve(parts, pipeline=attrs.evolve(parts.pipeline, whole=plan.model, megatron=loop))

    def _check(self, plan: Plan) -> None:
        ranks, layers = plan.mesh.pp, len(plan.model.layers)
        if plan.training.implementation not in MEGATRON:
            raise UnsupportedError(
                f"{self.name} of implementation {plan.training.implementation!r} is not modelled: use pipeline"
            )
        if ranks < 2:
            raise UsageError(f"'pp' must be at least 2 for {self.name}: {ranks}; leave the pipeline out")
        if self.rank >= ranks:
            raise UsageError(f"'rank' must be from 0 to {ranks - 1}, the ranks of the pipeline: {self.rank}")
        if layers % (ranks * self.chunks):
            stages = f"{ranks} ranks with {self.chunks} chunks each"
            raise UsageError(f"{layers} layers do not make equal stages on {stages}: change 'pp' or 'chunks'")
