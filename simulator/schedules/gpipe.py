"""GPipe: all micro-batches forward, then all backward."""

from __future__ import annotations

from typing import ClassVar

import attrs

from simulator.schedules.lockstep import Lane, lockstep
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Kind, Node


@attrs.frozen
class GPipe(Schedule):
    """Huang et al., NeurIPS 2019, arXiv:1811.06965, section 2.3; backward in the order of torch's ``ScheduleGPipe``."""

    name: ClassVar[str] = "gpipe"
    source: ClassVar[str] = "arXiv:1811.06965"

    def tree(self, rank: int) -> Node:  # noqa: ARG002
        """The same on every rank."""
        return lockstep(self.rounds, (Lane(Kind.F, -self.micro_batches), Lane(Kind.B, 0)))
