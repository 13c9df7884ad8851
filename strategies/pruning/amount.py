"""How much is pruned, and in which layers: the words that all techniques share."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

import attrs

from hardware.errors import UsageError
from simulator.limits import LARGEST_WIDTH, is_count, shown

#: More of one thing than any layer has.
MOST = LARGEST_WIDTH
_PERCENTAGE = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,9})?)\s*%")


@attrs.frozen
class Amount:
    """A number of things to remove from a layer, or a share of those it has."""

    count: int = 0
    share: Fraction = Fraction(0)
    """From 0 to below 1; 0 where a count is given."""

    def of(self, total: int, unit: int, what: str) -> int:
        """How many of `total` go, in multiples of `unit`; a share is rounded down to one.

        Raises:
            UsageError: a count that is no multiple of `unit`, none at all, or all there are.
        """
        removed = self.count or int(total * self.share) // unit * unit
        if removed % unit:
            below, above = removed // unit * unit, -(-removed // unit) * unit
            near = " or ".join(str(each) for each in (below, above) if 0 < each < total)
            way = f"remove {near}" if near else "remove whole groups instead"
            raise UsageError(f"'{what}' to prune must be a multiple of {unit}, not {removed} of {total}: {way}")
        if removed == 0 and self.share and unit < total:
            least = f"{100 * unit / total:.3g}%"
            raise UsageError(f"'{what}' {self} of {total} rounds down to none: ask for more than {least}")
        if not 0 < removed < total:
            raise UsageError(
                f"'{what}' to prune must be from 1 on, fewer than the {total} there are: {removed} ({self})"
            )
        return removed

    def __str__(self) -> str:
        return str(self.count) if self.count else f"{float(100 * self.share):g}%"


def to_amount(value: int | str | Amount) -> Amount:
    """``4`` or ``"25%"`` as an `Amount`; `UsageError` otherwise."""
    if isinstance(value, Amount):
        return value
    if is_count(value, MOST):
        return Amount(count=int(value))
    text = str(value).strip()
    match = _PERCENTAGE.fullmatch(text)
    if match and Fraction(match[1]):
        return Amount(share=Fraction(match[1]) / 100)
    if text.isascii() and text.isdigit() and len(text) < 10 and is_count(int(text), MOST):
        return Amount(count=int(text))
    raise UsageError(f"an amount to prune must be a whole number from 1 on, or a percentage below 100%: {shown(value)}")


def to_layers(value: Sequence[int] | None) -> tuple[int, ...] | None:
    """Indices of layers, sorted, each once; None for every layer."""
    if value is None:
        return None
    wrong = next((each for each in value if each != 0 and not is_count(each, MOST)), None)
    if wrong is not None or not value:
        raise UsageError(f"'layers' to prune must be indices from 0 on, at least one: {shown(wrong)}")
    return tuple(sorted(set(value)))


def ranges(indices: Sequence[int]) -> str:
    """Sorted indices as people write them: ``2, 5-7``."""
    starts = [i for i in indices if i - 1 not in indices]
    ends = [i for i in indices if i + 1 not in indices]
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True))
