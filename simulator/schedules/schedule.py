"""What every pipeline schedule is: ranks, micro-batches and chunks, and a tree of actions for each rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import attrs

from hardware.errors import UsageError
from simulator.limits import count_rule, is_count, shown
from simulator.schedules.lockstep import Rounds
from simulator.schedules.tree import Node

#: Far above every pipeline run, and few enough that every rank's tree is made in seconds.
LARGEST = {"pp": 512, "micro_batches": 2**24, "chunks": 64, "group": 2**24}
#: Named in errors: schedules that take several chunks, and the one that takes just one.
MORE_CHUNKS, ONE_CHUNK = "interleaved_1f1b or zb_h1", "1f1b"


def _count(_: Schedule, attribute: attrs.Attribute[int], value: object) -> None:
    largest = LARGEST[attribute.name]
    if not is_count(value, largest):
        raise UsageError(f"{attribute.name!r} {count_rule(largest)}: {shown(value)}")


@attrs.frozen
class Schedule(ABC):
    """Which rank computes what, in which order; what that takes in memory is not its business.

    Attributes:
        pp: ranks of the pipeline.
        micro_batches: per optimizer step.
        chunks: parts of the model that one rank holds; each is one stage.
        group: micro-batches that run through one chunk before the next; only schedules that interleave use it.

    Raises:
        UsageError: numbers for which the schedule is not defined.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    #: Chunks that may be asked for; the first is the default.
    legal_chunks: ClassVar[range] = range(1, 2)
    #: Whether `group` says when the next chunk's turn is.
    interleaves: ClassVar[bool] = False

    pp: int = attrs.field(validator=_count)
    micro_batches: int = attrs.field(validator=_count)
    chunks: int = attrs.field(validator=_count)
    group: int = attrs.field(validator=_count)

    @chunks.default
    def _default_chunks(self) -> int:
        return self.legal_chunks[0]

    @group.default
    def _default_group(self) -> int:
        return self.usual_group()

    def __attrs_post_init__(self) -> None:
        low, high = self.legal_chunks[0], self.legal_chunks[-1]
        if self.chunks not in self.legal_chunks:
            rule, other = (f"{low}", MORE_CHUNKS) if low == high else (f"at least {low}", ONE_CHUNK)
            raise UsageError(f"'chunks' of {self.name} must be {rule}: {self.chunks}; leave it out, or take {other}")
        self.check()

    def usual_group(self) -> int:
        """What `group` is unless given; without interleaving it changes nothing."""
        return self.micro_batches

    def check(self) -> None:
        """Refuse what the schedule is not defined for, beyond counts and chunks.

        Raises:
            UsageError: the field, the rule and the way out.
        """
        if self.group != self.usual_group():
            raise UsageError(f"{self.name} has no 'group': {self.group}; leave it out, or take {MORE_CHUNKS}")

    @property
    def stages(self) -> int:
        """Parts that the model is cut into."""
        return self.pp * self.chunks

    @property
    def rounds(self) -> Rounds:
        """The order in which chunks and micro-batches take turns."""
        return Rounds(self.micro_batches, self.chunks, self.group)

    def stage(self, rank: int, chunk: int) -> int:
        """The stage, from 0 on, that is a rank's chunk: here the chunks go round the ranks."""
        return chunk * self.pp + rank

    @abstractmethod
    def tree(self, rank: int) -> Node:
        """All actions of a rank in one optimizer step."""


@attrs.frozen
class VShaped(Schedule):
    """Two chunks per rank: down the ranks with the first, up again with the second."""

    legal_chunks: ClassVar[range] = range(2, 3)

    def stage(self, rank: int, chunk: int) -> int:
        """The first and the last stage are on rank 0."""
        return rank if chunk == 0 else self.stages - 1 - rank
