"""DualPipe: micro-batches enter at both ends, and the forward of one overlaps the backward of another."""

from __future__ import annotations

from typing import ClassVar

import attrs

from hardware.errors import UsageError
from simulator.schedules.counted import Entry, Turns
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Kind, Node


@attrs.frozen
class DualPipe(Schedule):
    """DeepSeek-V3 (arXiv:2412.19437, section 3.2.1); the steps of ``dualpipe/dualpipe.py`` of deepseek-ai/DualPipe.

    Chunk 0 of a rank is for the first half of the micro-batches, which enter at rank 0, chunk 1 for the others,
    which enter at the last rank: every stage is held by two ranks.
    """

    name: ClassVar[str] = "dualpipe"
    source: ClassVar[str] = "arXiv:2412.19437"
    legal_chunks: ClassVar[range] = range(2, 3)

    def check(self) -> None:
        """The assertions of ``DualPipe.step``.

        Raises:
            UsageError: ranks or micro-batches that have no second half, or too few to fill the pipeline.
        """
        super().check()
        if self.pp % 2:
            raise UsageError(f"'pp' of {self.name} must be even: {self.pp}; take {self.pp + 1}, or dualpipev or zbv")
        if self.micro_batches % 2 or self.micro_batches < 2 * self.pp:
            enough = max(2 * self.pp, self.micro_batches + self.micro_batches % 2)
            raise UsageError(
                f"'micro_batches' of {self.name} must be even and at least 2 x pp = {2 * self.pp}: "
                f"{self.micro_batches}; take {enough}, or 1f1b"
            )

    @property
    def stages(self) -> int:
        """One for each rank, although it holds two."""
        return self.pp

    def stage(self, rank: int, chunk: int) -> int:
        """Chunk 1 counts from the other end."""
        return rank if chunk == 0 else self.pp - 1 - rank

    def tree(self, rank: int) -> Node:
        """The ranks of the second half do what their mirror image does, with the other chunk."""
        near, far = (0, 1) if rank < self.pp // 2 else (1, 0)
        half = self.micro_batches // 2
        turns = Turns(first=(0, half))
        bidirectional(turns, near, far, min(rank, self.pp - 1 - rank), self.pp // 2, half)
        return turns.tree()


def bidirectional(turns: Turns, near: int, far: int, place: int, places: int, micro_batches: int) -> None:
    """The eight steps that DualPipe and DualPipeV share.

    Args:
        turns: what they are written to.
        near: the chunk whose micro-batches come in at place 0.
        far: the other; its micro-batches reach place 0 last.
        place: how far the rank is from where the near chunk's micro-batches come in.
        places: ranks that they pass.
        micro_batches: of each chunk.
    """
    below, above = places - place - 1, place + 1
    near_f, near_b, near_i = (Kind.F, near), (Kind.B, near), (Kind.I, near)
    far_f, far_b, far_i, far_w = (Kind.F, far), (Kind.B, far), (Kind.I, far), (Kind.W, far)
    with_near_f: Entry = (Kind.F, near, True)
    with_far_f: Entry = (Kind.F, far, True)
    turns.run(2 * below, near_f)
    turns.run(above, near_f, far_f)
    turns.run(below, far_i, far_w, far_f)
    # At the turning point the first forward and backward are not overlapped, which shortens the bubble.
    alone = 1 if below == 0 else 0
    turns.run(alone, near_f, far_b, with_far_f, near_b)
    turns.run(micro_batches - 2 * places + above - alone, with_near_f, far_b, with_far_f, near_b)
    turns.run(below, far_b, with_far_f, near_b)
    # The first half of the last backwards is whole, the second leaves the weights for later.
    whole = above // 2
    turns.run(whole, far_b, near_b)
    if place % 2 == 0:
        turns.postpone(1, far_b, near_i)
        whole += 1
    turns.postpone(above - whole, far_i, near_i)
    turns.weights(below, near_i)
    turns.weights(above)
