"""DualPipeV: DualPipe cut in half, so that each stage is held once."""

from __future__ import annotations

from typing import ClassVar

import attrs

from hardware.errors import UsageError
from simulator.schedules.counted import Turns
from simulator.schedules.dualpipe import bidirectional
from simulator.schedules.schedule import VShaped
from simulator.schedules.tree import Node


@attrs.frozen
class DualPipeV(VShaped):
    """Sea AI Lab's cut-in-half of DualPipe (arXiv:2412.19437); ``dualpipe/dualpipev.py`` of deepseek-ai/DualPipe.

    torch's ``ScheduleDualPipeV`` is the same.
    """

    name: ClassVar[str] = "dualpipev"
    source: ClassVar[str] = "arXiv:2412.19437"

    def check(self) -> None:
        """The assertion of ``DualPipeV.step``.

        Raises:
            UsageError: too few micro-batches to fill the pipeline.
        """
        super().check()
        if self.micro_batches < 2 * self.pp:
            raise UsageError(
                f"'micro_batches' of {self.name} must be at least 2 x pp = {2 * self.pp}: "
                f"{self.micro_batches}; take {2 * self.pp}, or zbv"
            )

    def tree(self, rank: int) -> Node:
        """The near chunk is the first, down the ranks, the far one the second, up again."""
        turns = Turns(first=(0, 0))
        bidirectional(turns, 0, 1, rank, self.pp, self.micro_batches)
        return turns.tree()
