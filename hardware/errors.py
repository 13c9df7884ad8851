"""What a user did wrong, said in one line: field, rule, value, way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong input: the command line prints its one line and exits with code 2."""


class UnsupportedError(UsageError):
    """A legal input that vramsim does not model (yet): refused, never guessed."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UsageError:
    """One line for a name that no table holds, with the nearest known ones."""
    choices = sorted(known)
    typed = str(name).lower()
    longer = [choice for choice in choices if typed and choice.startswith(typed)][:3]
    near = longer or difflib.get_close_matches(typed, choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(choices)}"
    return UsageError(f"no {kind} named {str(name)!r}; {hint}")
