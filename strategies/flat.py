"""Where weights lie in a flat buffer, and what of them a rank has: decisions on bytes, made on integers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs

from simulator.graph import Tensor
from simulator.sizes import Bindings, Dim, Dimensions


@attrs.frozen(eq=False)
class Member:
    """A weight of the real model in a flat buffer: elements from `start` to before `end`; `layer` where it has one."""

    tensor: Tensor
    layer: int | None
    start: int
    end: int

    @property
    def elements(self) -> int:
        """How many it has."""
        return self.end - self.start

    @property
    def label(self) -> str:
        """A name that no other weight has: a built layer stands for several of the real model."""
        label = self.tensor.storage.label
        return label if self.layer is None else f"layers.{self.layer}.{label}"


def lay_out(
    weights: Sequence[tuple[Tensor, int | None]], bindings: Bindings, alignment: int, multiple: int
) -> tuple[list[Member], list[int]]:
    """One weight after the other, each at a multiple of `alignment` elements, the end at one of `multiple`.

    Returns:
        The members, and the elements of each gap between and after them.
    """
    members: list[Member] = []
    gaps: list[int] = []
    end = 0
    for tensor, layer in weights:
        gaps.append(-end % alignment)
        start = end + gaps[-1]
        end = start + int(tensor.storage.size.elements(bindings))
        members.append(Member(tensor, layer, start, end))
    gaps.append(-end % multiple)
    return members, [gap for gap in gaps if gap]


def rank_pieces(
    members: Sequence[Member], first: int, end: int, dimensions: Dimensions
) -> Iterator[tuple[Tensor, str, tuple[Dim, ...]]]:
    """What of each member lies in elements `first` to before `end`: weight, label and dimensions of the piece.

    A whole weight keeps its dimensions; part of one is a dimension of its own.
    """
    for member in members:
        elements = min(end, member.end) - max(first, member.start)
        if elements == member.end - member.start:
            yield member.tensor, member.label, member.tensor.dims
        elif elements > 0:
            yield member.tensor, member.label, (dimensions.bind(f"{member.label}.piece", elements),)
