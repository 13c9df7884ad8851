"""What a rank keeps beside its device: host memory, page-locked or not, and NVMe."""

from __future__ import annotations

from collections.abc import Iterable

import attrs


@attrs.frozen(kw_only=True)
class HostMemory:
    """Bytes of the tensors of one rank, without what an allocator rounds up."""

    pinned: int = 0
    """In page-locked memory, which cannot be swapped out."""
    pageable: int = 0
    nvme: int = 0
    """On drives, not in memory."""

    @property
    def nbytes(self) -> int:
        """In host memory, page-locked or not."""
        return self.pinned + self.pageable


def total(parts: Iterable[HostMemory]) -> HostMemory:
    """All of them together."""
    found = list(parts)
    return HostMemory(
        pinned=sum(each.pinned for each in found),
        pageable=sum(each.pageable for each in found),
        nvme=sum(each.nvme for each in found),
    )
