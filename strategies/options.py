"""How strategies declare their options: a default, a rule and one line of help, read by the command line too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs

from hardware.dtypes import DType
from hardware.errors import UnsupportedError, UsageError, unknown_name

Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def option(default: Any, rule: Validator, help_text: str, source: str = "") -> Any:
    """A field that users may set as ``NAME,option=value``.

    Args:
        help_text: one line that says what it does.
        source: where the framework documents it, or has it in code, if not in the strategy's own source.
    """
    return attrs.field(default=default, validator=rule, metadata={"help": help_text, "source": source})


def flag(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    """True or false."""
    if not isinstance(value, bool):
        raise UsageError(f"{attribute.name!r} must be true or false: {value!r}")


def choice(*names: str) -> Validator:
    """One of some names."""

    def rule(_: object, attribute: attrs.Attribute[str], value: object) -> None:
        if value not in names:
            raise unknown_name(attribute.name, value, names)

    return rule


def later(modelled: str | tuple[str, ...], *others: str) -> Validator:
    """A name of which only those `modelled` can be had so far; the `others` exist, too."""
    had = (modelled,) if isinstance(modelled, str) else modelled
    known = choice(*had, *others)

    def rule(instance: object, attribute: attrs.Attribute[str], value: str) -> None:
        known(instance, attribute, value)
        if value not in had:
            raise UnsupportedError(f"{attribute.name!r} {value} is not modelled yet; leave it out")

    return rule


def text(_: object, attribute: attrs.Attribute[str], value: object) -> None:
    """Words."""
    if not isinstance(value, str):
        raise UsageError(f"{attribute.name!r} must be text: {value!r}")


def count(smallest: int, largest: int = 2**62) -> Validator:
    """A whole number."""

    def rule(_: object, attribute: attrs.Attribute[int], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
            raise UsageError(f"{attribute.name!r} must be a whole number from {smallest} to {largest}: {value!r}")

    return rule


def training_dtype(_: object, attribute: attrs.Attribute[DType | None], value: object) -> None:
    """An element type, or None for the weights' own."""
    if value is not None and not isinstance(value, DType):
        raise UsageError(f"{attribute.name!r} must be fp32, bf16, fp16 or none: {value!r}")


def number(smallest: float, largest: float) -> Validator:
    """A number, whole or not."""

    def rule(_: object, attribute: attrs.Attribute[float], value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not smallest <= value <= largest:
            raise UsageError(f"{attribute.name!r} must be a number from {smallest} to {largest}: {value!r}")

    return rule
