"""What every recorded rank of a pipeline has to show besides its peaks."""

from __future__ import annotations

from simulator import simulate
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.report import Report
from simulator.timeline import LiveSet, moments, timeline
from studies.validation.distributed import distributed_case


def recorded(line) -> Report:
    """The rank that was recorded, simulated."""
    case = distributed_case(line)
    return simulate(case.model, case.training, case.strategies, mesh=case.mesh, rank=case.rank)


def assert_folded_is_unrolled(report: Report) -> None:
    """Nothing is freed that is not there; the steady step and what is live at both peaks agree with folding."""
    program, live = report.program, LiveSet(concurrent=True)
    parts = {"load": program.load, "cold": program.cold, "steady": program.steady}
    for node in parts.values():
        for moment in moments(node):
            live.run(moment)
    unrolled = timeline(parts, program.bindings)
    assert unrolled.total[unrolled.marks["steady"] :].max() == report.steady.nbytes
    for step in (report.cold, report.steady):
        assert sum(each.nbytes for each in report.live(step)) == step.nbytes


def assert_repeats_stand_for_every_layer(line) -> None:
    """Building every layer of the rank gives the same peaks."""
    case = distributed_case(line)
    built = apply(make_plan(case.model, case.training, mesh=case.mesh, rank=case.rank, unrolled=True), case.strategies)
    every, few = Report(built, lower(built)), recorded(line)
    assert (every.cold.nbytes, every.steady.nbytes) == (few.cold.nbytes, few.steady.nbytes)
    assert every.steady.by_role == few.steady.by_role
