"""What a rank keeps between steps."""

from __future__ import annotations

from simulator.report import Report
from simulator.roles import Role
from simulator.timeline import LiveSet, moments


def kept(report: Report) -> dict[Role, int]:
    """Exact bytes by role of what is alive between steps."""
    live, found = LiveSet(), {}
    for node in (report.program.load, report.program.cold):
        for moment in moments(node):
            live.run(moment)
    for each in live.storages(report.program.bindings):
        nbytes = each.storage.size.nbytes(report.program.bindings)
        found[each.storage.role] = found.get(each.storage.role, 0) + nbytes
    return found
