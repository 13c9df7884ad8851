"""Bytes to text and back; everywhere else a byte count is a plain int."""

from __future__ import annotations

import re
from decimal import Decimal

from hardware.errors import UsageError

KIB = 1024
MIB = 1024**2
GIB = 1024**3
GB = 1000**3

_BY_UNIT = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": GB, "tb": 1000**4}
_BY_UNIT |= {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024**4}
# At most twelve digits: a typing slip, not a number, is longer.
_QUANTITY = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)\s*([kmgt]i?b|b)", re.IGNORECASE)


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


def parse(field: str, text: str) -> int:
    """The bytes of ``24GiB`` (binary) or ``80GB`` (decimal), in any case and rounded down; `field` is for the error.

    Raises:
        UsageError: `text` is not a positive number with a unit.
    """
    match = _QUANTITY.fullmatch(text.strip())
    nbytes = int(Decimal(match[1]) * _BY_UNIT[match[2].lower()]) if match else 0
    if nbytes <= 0:
        raise UsageError(f"{field!r} must be a positive number of bytes with its unit, e.g. 24GiB or 80GB: {text!r}")
    return nbytes
