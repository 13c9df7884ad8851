"""Interleaved 1F1B: each rank holds several chunks of the model, which take turns."""

from __future__ import annotations

from typing import ClassVar

import attrs

from hardware.errors import UsageError
from simulator.schedules.lockstep import Lane, lockstep
from simulator.schedules.schedule import LARGEST, Schedule
from simulator.schedules.tree import Kind, Node


@attrs.frozen
class Interleaving(Schedule):
    """Micro-batches in groups, of `pp` unless said otherwise, that go through all chunks one group after the other."""

    interleaves: ClassVar[bool] = True

    def usual_group(self) -> int:
        """Megatron-LM's default; a single chunk has no use for groups."""
        return self.micro_batches if self.chunks == 1 else self.pp

    def check(self) -> None:
        """Groups as Megatron-LM's ``forward_backward_pipelining_with_interleaving`` has them, and as torch has.

        torch takes any number of micro-batches below `pp` as one group; Megatron-LM does not.

        Raises:
            UsageError: a group that a rank would have to wait for.
        """
        if self.chunks == 1:
            return
        rest = self.micro_batches % self.group
        smallest = min(self.pp, self.micro_batches)
        if self.group < smallest or self.group > self.micro_batches or 0 < rest < self.pp:
            raise UsageError(
                f"'micro_batches' of {self.name} must be whole groups of {self.group} "
                f"(or leave {self.pp} or more for the last): {self.micro_batches}; {self._way_out()}"
            )

    def _way_out(self) -> str:
        below = self.micro_batches // self.pp * self.pp
        counts = f"{below} or {below + self.pp}" if below else f"{self.pp}"
        # torch's ScheduleInterleaved1F1B spreads the micro-batches over whole groups of pp and more.
        groups = max(1, self.micro_batches // self.pp)
        group = self.micro_batches // groups
        even = self.micro_batches % groups == 0 and group != self.group
        alone = "" if self.group == self.usual_group() else " without 'group'"
        return f"take {counts}{alone}" + (f", or 'group' {group}" if even else "")


@attrs.frozen
class Interleaved(Interleaving):
    """Narayanan et al., SC21, arXiv:2104.04473, section 2.2.2.

    The warm-up is that of Megatron-LM's ``get_pp_rank_microbatches``; torch's ``ScheduleInterleaved1F1B`` is the same.
    """

    name: ClassVar[str] = "interleaved_1f1b"
    source: ClassVar[str] = "arXiv:2104.04473"
    legal_chunks: ClassVar[range] = range(2, LARGEST["chunks"] + 1)

    def tree(self, rank: int) -> Node:
        """A group ahead for each chunk but one, and two forwards less for every rank further down."""
        ahead = min(2 * (self.pp - 1 - rank) + (self.chunks - 1) * self.group, self.rounds.length)
        return lockstep(self.rounds, (Lane(Kind.F, -ahead), Lane(Kind.B, 0)))
