"""The device mesh: how many ranks along each axis; their product is the world."""

from __future__ import annotations

import math

import attrs

from hardware.errors import UsageError
from simulator.limits import is_count

#: Far above every cluster built.
LARGEST_DEGREE = 10_000_000


def _degree(_: Mesh, attribute: attrs.Attribute[int], value: object) -> None:
    if not is_count(value, LARGEST_DEGREE):
        raise UsageError(f"{attribute.name!r} must be a whole number from 1 to {LARGEST_DEGREE}: {value!r}")


@attrs.frozen(kw_only=True)
class Mesh:
    """Degrees of parallelism, outermost axis first (the order of torchtitan's ``ParallelDims``).

    Raises:
        UsageError: a degree that is not a positive whole number.
    """

    pp: int = attrs.field(default=1, validator=_degree)
    dp_replicate: int = attrs.field(default=1, validator=_degree)
    dp_shard: int = attrs.field(default=1, validator=_degree)
    cp: int = attrs.field(default=1, validator=_degree)
    tp: int = attrs.field(default=1, validator=_degree)
    ep: int = attrs.field(default=1, validator=_degree)
    """Ranks that share the experts: no axis of its own, but consecutive ranks of ``dp_shard``.

    Expert layers see the ranks of a pipeline stage as ``dp_shard / ep`` times ``ep``.
    """

    def __attrs_post_init__(self) -> None:
        if self.dp_shard % self.ep:
            raise UsageError(f"'ep' must divide 'dp_shard', the {self.dp_shard} ranks that share experts: {self.ep}")

    @property
    def degrees(self) -> dict[str, int]:
        """Axis name to degree, outermost first."""
        return {axis: degree for axis, degree in attrs.asdict(self).items() if axis != "ep"}

    @property
    def expert_shards(self) -> int:
        """Of ``dp_shard``, the ranks that have the same experts."""
        return self.dp_shard // self.ep

    @property
    def world(self) -> int:
        """How many ranks there are."""
        return math.prod(self.degrees.values())

    @property
    def dp(self) -> int:
        """Ranks that see different data: replicas times shards."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_shard_cp(self) -> int:
        """Ranks among which weights that see different tokens may be sharded: along ``dp_shard`` and ``cp``."""
        return self.dp_shard * self.cp

    @property
    def dp_cp(self) -> int:
        """Ranks that see different tokens, whose gradients are summed."""
        return self.dp * self.cp

    def __str__(self) -> str:
        named = [f"{axis} {degree}" for axis, degree in self.degrees.items() if degree > 1]
        experts = f" (experts over {self.ep})" if self.ep > 1 else ""
        return (" x ".join(named) or "one device") + experts
