"""What a rank keeps between steps, read off the program: for properties over all ranks."""

from __future__ import annotations

from collections import Counter

from simulator.lowering import lower
from simulator.plan import Plan
from simulator.roles import Role
from simulator.timeline import LiveSet, moments


def persistent(plan: Plan) -> Counter[Role]:
    """Exact bytes by role, before the allocator rounds, that live after a cold step."""
    program, live = lower(plan), LiveSet()
    for node in (program.load, program.cold):
        for moment in moments(node):
            live.run(moment)
    found: Counter[Role] = Counter()
    for alive in live.storages(program.bindings):
        found[alive.storage.role] += int(alive.storage.size.nbytes(program.bindings))
    return found
