"""The shipped data tables: CSV files whose headers carry the unit, with low and high columns for ranges."""

from __future__ import annotations

import csv
from collections.abc import Mapping

import attrs

Row = Mapping[str, str]


@attrs.frozen
class Band:
    """A number that sources give as `low` to `high`, in base units (bytes/s, op/s, pieces); equal where they agree."""

    low: int
    high: int = attrs.field()

    @high.validator
    def _ordered(self, _attribute: object, value: int) -> None:
        if not 0 < self.low <= value:
            raise ValueError(f"a band needs 0 < low <= high: {self.low}..{value}")


def read_table(file: str) -> list[Row]:
    """The rows of `hardware/data/<file>` as text by column; an empty cell means unknown."""
    # Imported here: it costs more than the rest of this package together.
    from importlib.resources import files

    text = (files("hardware") / "data" / file).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def read_band(row: Row, name: str, unit: str = "", scale: int = 1) -> Band | None:
    """The columns ``<name>_low_<unit>`` and ``<name>_high_<unit>`` times `scale`; None where they are empty."""
    low, high = (row["_".join(filter(None, (name, end, unit)))] for end in ("low", "high"))
    if not low or not high:
        return None
    return Band(round(float(low) * scale), round(float(high) * scale))
