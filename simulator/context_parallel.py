"""Context parallelism: each rank of mesh axis ``cp`` has a part of every sequence, and attention alone needs the rest.

Everything outside attention runs as on one device with a shorter sequence: dimension ``s`` is bound to the rank's
part, and the whole is ``cp`` times it.
"""

from __future__ import annotations

import attrs

#: The mesh axis.
AXIS = "cp"
#: A whole sequence.
WHOLE = (AXIS, "s")


@attrs.frozen
class ContextParallelism:
    """How attention sees the whole sequence."""

    communication: str = "p2p"
    """What ranks exchange: ``a2a`` sequences for heads, ``p2p`` keys and values in a ring, ``all_gather`` them."""
    rank: int = 0
    """The rank along ``cp`` that is simulated: how many keys come before its queries decides what it keeps."""

    @property
    def uneven(self) -> bool:
        """Whether ranks differ in what they allocate: they exchange heads evenly, but not keys that come before."""
        return self.communication != "a2a"
