"""The ranks of a job: one report for each class of them."""

from __future__ import annotations

import attrs

from simulator import simulate
from simulator.api import simulate_ranks as simulate_ranks_of
from simulator.model import ModelSpec
from simulator.plan import RankClass, apply, make_plan, rank_classes
from simulator.report import Report
from studies.options import Resolved
from studies.pipelines import AnyPipeline, StagesOfRank, stages_of

#: Classes of ranks that are simulated.
MOST_RANK_CLASSES = 6


@attrs.frozen(eq=False)
class SimulatedRanks:
    """A class of ranks and the report of one of them."""

    ranks: RankClass
    report: Report
    stages: StagesOfRank | None = None
    """What it has of a pipeline."""


def simulate_ranks(model: ModelSpec, resolved: Resolved) -> list[SimulatedRanks]:
    """One report per class of ranks, the highest peak first; of many classes the fullest and the emptiest.

    Of a pipeline, one report of each of its ranks.
    """
    if resolved.pipeline is not None:
        return _simulate_pipeline(model, resolved, resolved.pipeline)
    plan = apply(make_plan(model, resolved.training, mesh=resolved.mesh), resolved.strategies)
    classes = rank_classes(plan)
    if len(classes) > MOST_RANK_CLASSES:
        classes = [*classes[: MOST_RANK_CLASSES - 1], classes[-1]]
    found = []
    for ranks in classes:
        report = simulate(model, resolved.training, resolved.strategies, mesh=resolved.mesh, rank=ranks.rank)
        found.append(SimulatedRanks(ranks, report))
    return sorted(found, key=lambda each: -each.report.peak.nbytes)


def _simulate_pipeline(model: ModelSpec, resolved: Resolved, pipeline: AnyPipeline) -> list[SimulatedRanks]:
    pp, training = resolved.mesh.pp, resolved.training
    reports = simulate_ranks_of(model, training, [resolved.of_rank(rank) for rank in range(pp)], mesh=resolved.mesh)
    whole = reports[0].plan.pipeline
    assert whole is not None
    each = resolved.mesh.world // pp
    found = [
        SimulatedRanks(RankClass(f"pipeline rank {stages.rank}", each, 0), report, stages)
        for report, stages in zip(
            reports, stages_of(pipeline, whole.whole, pp, training.gradient_accumulation), strict=True
        )
    ]
    return sorted(found, key=lambda each: -each.report.peak.nbytes)
