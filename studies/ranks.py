"""The ranks of a job: one report for each class of them."""

from __future__ import annotations

import attrs

from simulator import simulate
from simulator.model import ModelSpec
from simulator.plan import RankClass, apply, make_plan, rank_classes
from simulator.report import Report
from studies.options import Resolved

#: Classes of ranks that are simulated.
MOST_RANK_CLASSES = 6


@attrs.frozen(eq=False)
class SimulatedRanks:
    """A class of ranks and the report of one of them."""

    ranks: RankClass
    report: Report


def simulate_ranks(model: ModelSpec, resolved: Resolved) -> list[SimulatedRanks]:
    """One report per class of ranks, the highest peak first; of many classes the fullest and the emptiest."""
    plan = apply(make_plan(model, resolved.training, mesh=resolved.mesh), resolved.strategies)
    classes = rank_classes(plan)
    if len(classes) > MOST_RANK_CLASSES:
        classes = [*classes[: MOST_RANK_CLASSES - 1], classes[-1]]
    found = []
    for ranks in classes:
        report = simulate(model, resolved.training, resolved.strategies, mesh=resolved.mesh, rank=ranks.rank)
        found.append(SimulatedRanks(ranks, report))
    return sorted(found, key=lambda each: -each.report.peak.nbytes)
