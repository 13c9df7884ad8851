"""Links between GPUs, to the host and between nodes, by the speed of one direction."""

from __future__ import annotations

from functools import cache

import attrs

from hardware.errors import unknown_name
from hardware.tables import Band, Row, read_band, read_table
from hardware.units import GB


@attrs.frozen
class Link:
    """A connection of one GPU.

    `bandwidth` is bytes per second in one direction, to all peers together; `per_peer` the part that reaches one
    peer where the fabric has no switch (None: any one peer may use it all). `source` says who gives the numbers,
    `confidence` how far they were checked.
    """

    name: str
    bandwidth: Band
    per_peer: int | None = None
    product: str = ""
    source: str = ""
    confidence: str = ""

    @property
    def bytes_per_second_per_direction(self) -> int:
        """The cautious end of `bandwidth`."""
        return self.bandwidth.low


def link(name: str) -> Link:
    """The link called `name` (``nvlink4``, ``pcie5``, ``ib-ndr``); `UsageError` with the nearest names otherwise."""
    table = _links()
    try:
        return table[name.strip().lower()]
    except KeyError:
        raise unknown_name("link", name, table) from None


def link_names() -> list[str]:
    """Every known link, sorted."""
    return sorted(_links())


@cache
def _links() -> dict[str, Link]:
    return {row["name"]: _read(row) for row in read_table("links.csv")}


def _read(row: Row) -> Link:
    bandwidth = read_band(row, "", "GBps_per_direction", GB)
    assert bandwidth is not None, f"links.csv gives no speed for {row['name']}"
    peer = row["per_peer_GBps"]
    return Link(
        name=row["name"],
        bandwidth=bandwidth,
        per_peer=round(float(peer) * GB) if peer else None,
        product=row["product"],
        source=row["source"],
        confidence=row["confidence"],
    )
