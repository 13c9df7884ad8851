"""1F1B: a backward follows each forward as soon as the pipeline is full."""

from __future__ import annotations

from typing import ClassVar

import attrs

from simulator.schedules.lockstep import Lane, lockstep
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Kind, Node


@attrs.frozen
class OneForwardOneBackward(Schedule):
    """PipeDream-Flush (Narayanan et al., ICML 2021, arXiv:2006.09503, section 2.2; arXiv:2104.04473, section 2.2.1).

    Megatron-LM's ``forward_backward_pipelining_without_interleaving`` and torch's ``Schedule1F1B``.
    """

    name: ClassVar[str] = "1f1b"
    source: ClassVar[str] = "arXiv:2006.09503"

    def tree(self, rank: int) -> Node:
        """One forward less ahead for every rank further down."""
        ahead = min(self.pp - 1 - rank, self.micro_batches)
        return lockstep(self.rounds, (Lane(Kind.F, -ahead), Lane(Kind.B, 0)))
