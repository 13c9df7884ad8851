"""Which of Liger's kernels a recorded case switches on."""

from __future__ import annotations

from typing import Any

from simulator.liger import Liger, default_kernels, liger


def liger_of(switches: Any, family: str) -> Liger:
    """Names of kernels, or ``default`` for what the family's function patches; nothing where there are none.

    Raises:
        UsageError: a name that is no kernel's.
        UnsupportedError: a family that Liger does not patch.
    """
    return liger(default_kernels(family) if switches == "default" else tuple(switches or ()))
