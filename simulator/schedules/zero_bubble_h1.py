"""Zero-bubble H1: backward in two halves, that for the weights fills what would be idle."""

from __future__ import annotations

from typing import ClassVar

import attrs

from simulator.schedules.interleaved import Interleaving
from simulator.schedules.lockstep import Lane, lockstep
from simulator.schedules.schedule import LARGEST
from simulator.schedules.tree import Kind, Node


@attrs.frozen
class ZeroBubbleH1(Interleaving):
    """ZB-H1 of Qi et al., ICLR 2024, arXiv:2401.10241, section 2.1.

    With more than one chunk it is torch's ``ScheduleInterleavedZeroBubble``; with one, both are the same.
    """

    name: ClassVar[str] = "zb_h1"
    source: ClassVar[str] = "arXiv:2401.10241"
    legal_chunks: ClassVar[range] = range(1, LARGEST["chunks"] + 1)

    def tree(self, rank: int) -> Node:
        """1F1B, in which each rank puts off as many gradients of weights as it has forwards less than rank 0."""
        ahead = min(self.pp - 1 - rank + (self.chunks - 1) * self.group, self.rounds.length)
        return lockstep(self.rounds, (Lane(Kind.F, -ahead), Lane(Kind.I, 0), Lane(Kind.W, rank)))
