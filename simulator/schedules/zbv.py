"""ZBV: the zero-bubble schedule of two chunks per rank, placed in a V."""

from __future__ import annotations

from typing import ClassVar

import attrs

from simulator.schedules.counted import Turns
from simulator.schedules.schedule import VShaped
from simulator.schedules.tree import Kind, Node

F0, I0, W0 = (Kind.F, 0), (Kind.I, 0), (Kind.W, 0)
F1, I1, W1 = (Kind.F, 1), (Kind.I, 1), (Kind.W, 1)


@attrs.frozen
class ZeroBubbleV(VShaped):
    """ZB-V of Qi et al., arXiv:2401.10241, section 6, for equal times of F, I and W; torch's ``ScheduleZBVZeroBubble``.

    It fills the pipeline with 2 pp - 1 micro-batches; as in torch, fewer run in the same order without the others.
    """

    name: ClassVar[str] = "zbv"
    source: ClassVar[str] = "arXiv:2401.10241"

    def tree(self, rank: int) -> Node:
        """The forward of the first chunk fills the rank, then both chunks take turns with their backward."""
        below = self.pp - rank
        turns = Turns(first=(0, 0), end=self.micro_batches)
        turns.run(2 * below - 1, F0)
        turns.run(rank, F1, F0)
        turns.run(below, F1, I1, W1)
        turns.run(max(2 * self.pp - 1, self.micro_batches) - self.pp, F0, I0, W0, F1, I1, W1)
        turns.run(rank, I0, I1)
        turns.run(below, I0, W0)
        turns.run(rank, W1)
        turns.run(rank, W0)
        return turns.tree()
