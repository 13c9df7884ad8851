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

    @property
    def degrees(self) -> dict[str, int]:
        """Axis name to degree, outermost first."""
        return attrs.asdict(self)

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
        return " x ".join(named) or "one device"
