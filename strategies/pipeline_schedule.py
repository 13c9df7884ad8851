"""A rank of a pipeline by the name of its schedule, as users ask for it; `pipeline.py` runs the order.

Behaviour: torch 2.13 torch/distributed/pipelining/schedules.py (each schedule's constructor); the split of the layers
torchtitan/distributed/pipeline_parallel.py `generate_llm_fqn_per_model_part`, `pipeline_llm`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError, UsageError, unknown_name
from simulator.pipelines.order import rank_order
from simulator.plan import Plan
from simulator.schedules import SCHEDULES, schedule
from simulator.schedules.in_flight import InFlight, in_flight
from simulator.schedules.schedule import Schedule
from strategies.pipeline import PipelineParallel

#: Schedules that torch runs -> its loop, of `RUNTIMES`.
LOOPS = {
    "gpipe": "gpipe",
    "1f1b": "1f1b",
    "interleaved_1f1b": "runtime",
    "zb_h1": "runtime",
    "zbv": "runtime",
    "dualpipev": "runtime",
}
#: What people also call them.
ALIASES = {"interleaved": "interleaved_1f1b", "interleaved_zero_bubble": "zb_h1"}
#: `pipeline_llm`: stages of a rank whose schedule takes several, unless given.
VIRTUAL_STAGES = 2


@attrs.frozen(kw_only=True)
class PipelineSchedule:
    """Rank `rank` of a pipeline over mesh axis ``pp``; ``gradient_accumulation`` counts the micro-batches.

    Args:
        schedule: one of `LOOPS` or `ALIASES`, with ``_`` or ``-``.
        virtual_stages: stages of each rank; None for torchtitan's default, two where the schedule takes several.
        split: layers of each stage; None for torchtitan's, in which the embedding counts as a layer, and so do norm
            and head.
        rank: of the pipeline, from 0 on.

    Raises:
        UsageError: a schedule that is not known, or that is not defined for these numbers.
        UnsupportedError: one that torch does not have.
    """

    schedule: str = "1f1b"
    virtual_stages: int | None = None
    split: tuple[int, ...] | None = None
    rank: int = 0
    name: str = attrs.field(default="pipeline", init=False)
    axis: ClassVar[str] = "pp"

    @property
    def known_as(self) -> str:
        """The name under which the schedule is registered."""
        name = self.schedule.replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, [*LOOPS, *ALIASES])
        if name not in LOOPS:
            raise UnsupportedError(f"'schedule' {name} is not in torch.distributed.pipelining: take dualpipev or zbv")
        return name

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the rank's own layers."""
        order = self.made_for(plan.mesh.pp, plan.training.gradient_accumulation)
        stages = tuple(order.stage(self.rank, chunk) for chunk in range(order.chunks))
        cuts = self.cuts(len(plan.model.layers), order.stages)
        loop = LOOPS[self.known_as]
        return PipelineParallel(cuts=cuts, stages=stages, order=rank_order(order, self.rank), runtime=loop)(plan)

    def made_for(self, pp: int, micro_batches: int) -> Schedule:
        """The schedule of `pp` ranks.

        Raises:
            UsageError: what it is not defined for, or torch refuses.
        """
        name = self.known_as
        if pp < 2:
            raise UsageError(f"'pp' of a pipeline must be at least 2: {pp}; give --pp, or leave the schedule out")
        _check_micro_batches(name, pp, micro_batches)
        made = SCHEDULES[name]
        several = len(made.legal_chunks) > 1
        chunks = self.virtual_stages or (VIRTUAL_STAGES if several else made.legal_chunks[0])
        if several and chunks < VIRTUAL_STAGES:
            way = "take more, or 1f1b, which has one"
            raise UsageError(f"'virtual-stages' of {name} must be at least {VIRTUAL_STAGES}: {chunks}; {way}")
        if chunks not in made.legal_chunks:
            raise UsageError(f"'virtual-stages' of {name} must be {made.legal_chunks[0]}: {chunks}; leave it out")
        return schedule(name, pp, micro_batches, chunks, _group(name, pp, micro_batches) if several else None)

    def cuts(self, layers: int, stages: int) -> tuple[int, ...]:
        """The first layer of each of `stages`, and the number of `layers`."""
        if self.split is None:
            return (0, *accumulate(usual_split(layers, stages)))
        if len(self.split) != stages:
            raise UsageError(f"'pp-split' must have a number for each of {stages} stages: {_typed(self.split)}")
        if min(self.split) < 1:
            raise UsageError(f"'pp-split' must leave every stage a layer: {_typed(self.split)}")
        if sum(self.split) != layers:
            rule = f"must add up to the model's {layers} layers"
            raise UsageError(f"'pp-split' {rule}: {_typed(self.split)} = {sum(self.split)}")
        return (0, *accumulate(self.split))

    def in_flight(self, pp: int, micro_batches: int) -> InFlight:
        """What the rank holds at once, in micro-batches."""
        return in_flight(self.made_for(pp, micro_batches), self.rank)


def _check_micro_batches(name: str, pp: int, micro_batches: int) -> None:
    """What the constructors of ``Schedule1F1B`` and ``ScheduleDualPipeV`` want."""
    least, other = {"1f1b": (pp, "gpipe"), "dualpipev": (2 * pp, "zbv")}.get(name, (1, ""))
    if micro_batches < least:
        raise UsageError(
            f"'gradient-accumulation' of {name} must be at least its {least} stages: {micro_batches}; "
            f"take {least}, fewer ranks, or {other}"
        )


def _group(name: str, pp: int, micro_batches: int) -> int:
    """`microbatches_per_round` of ``ScheduleInterleaved1F1B`` and ``ScheduleInterleavedZeroBubble``."""
    rounds = max(1, micro_batches // pp)
    if micro_batches % rounds:
        below = micro_batches // pp * pp
        raise UsageError(
            f"'gradient-accumulation' of {name} must be a multiple of its {rounds} rounds of {pp} ranks: "
            f"{micro_batches}; take {below} or {below + pp}"
        )
    return micro_batches // rounds


def usual_split(layers: int, stages: int) -> list[int]:
    """Layers of each stage as torchtitan deals them out: first stages take one more where they do not divide.

    The embedding counts as a layer of the first stage, norm and head as one of the last. Where that would leave a
    stage without any, layers alone are dealt out.

    Raises:
        UsageError: fewer layers than stages.
    """
    if layers < stages:
        raise UsageError(f"'pp' makes {stages} stages of the model's {layers} layers: take {layers} or fewer")
    each, more = divmod(layers + 2, stages)
    split = [each + (stage < more) for stage in range(stages)]
    split[0] -= 1
    split[-1] -= 1
    if min(split) < 1:
        each, more = divmod(layers, stages)
        split = [each + (stage < more) for stage in range(stages)]
    return split


def _typed(split: tuple[int, ...]) -> str:
    return ",".join(map(str, split))
