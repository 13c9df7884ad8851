"""The largest sizes that are read, and how a wrong value is shown in an error.

The bounds lie far above any published model. They exist so that a typing error such as 10**30 is
an error and not an answer, and so that a product of sizes stays inside the 64-bit integers of
numpy: bytes of one stored tensor per layer, 2**20 * 2**22 * 8, times 10,000 layers is below 2**59. Stacks of experts
multiply that; where a product does not fit, folding counts in Python's own integers.
"""

from __future__ import annotations

LARGEST_HIDDEN = 2**20
LARGEST_WIDTH = 2**22
"""Of a feed-forward layer, and of all heads of a layer side by side."""
LARGEST_HEADS = 2**16
LARGEST_EXPERTS = 2**16
LARGEST_LAYERS = 10_000
LARGEST_VOCAB = 2**26
LARGEST_POSITIONS = 2**30
LARGEST_SOFTCAP = 1e9
_LONGEST_TEXT = 60


def shown(value: object) -> str:
    """`value` as JSON would spell it, short and on one line whatever it holds."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_TEXT else value[:_LONGEST_TEXT] + "...")
    return "a list" if isinstance(value, list | tuple) else "an object"


def is_count(value: object, largest: int) -> bool:
    """Whether `value` is an integer from 1 to `largest`; booleans and whole floats are not."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest


def is_number(value: object, smallest: float, largest: float) -> bool:
    """Whether `value` is an int or a float within the bounds; NaN never is."""
    return isinstance(value, int | float) and not isinstance(value, bool) and smallest <= value <= largest


def count_rule(largest: int) -> str:
    """The rule that `is_count` checks, for an error."""
    return f"must be an integer from 1 to {largest}"
