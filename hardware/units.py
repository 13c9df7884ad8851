"""Bytes to text and back; everywhere else a byte count is a plain int."""

from __future__ import annotations

KIB = 1024
MIB = 1024**2
GIB = 1024**3
GB = 1000**3


def gib(nbytes: int) -> str:
    """`nbytes` as binary gibibytes with two decimals, e.g. ``79.10 GiB``."""
    return f"{nbytes / GIB:.2f} GiB"


def gb(nbytes: int) -> str:
    """`nbytes` as decimal gigabytes with two decimals, the unit of vendors."""
    return f"{nbytes / GB:.2f} GB"


def mib(nbytes: int) -> str:
    """`nbytes` as binary mebibytes with one decimal."""
    return f"{nbytes / MIB:.1f} MiB"


def both(nbytes: int) -> str:
    """GiB and GB side by side: the two units people mix up."""
    return f"{gib(nbytes)} ({gb(nbytes)})"
