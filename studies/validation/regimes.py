"""What a case of the oracle says about checkpointing and freezing, in our words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from hardware.errors import UnsupportedError
from simulator.plan import Strategy
from strategies.bitfit import BitFit
from strategies.block_checkpointing import BlockCheckpointing
from strategies.checkpointing import FullCheckpointing
from strategies.freezing import Freezing
from strategies.interval_checkpointing import IntervalCheckpointing
from strategies.uniform_checkpointing import UniformCheckpointing

#: The option of a case that says what is checkpointed -> the strategy that does it.
_CHECKPOINTS: dict[str, Callable[..., Strategy]] = {
    "every": lambda value, **options: IntervalCheckpointing(n=value, **options),
    "first": lambda value, **options: BlockCheckpointing(layers=value, **options),
    "together": lambda value, **options: UniformCheckpointing(layers=value, **options),
}


def checkpointing_strategies(option: Any) -> list[Strategy]:
    """The strategies of a case's ``checkpointing``: nothing, true (every layer), or an object that says more.

    Raises:
        UnsupportedError: a value that is not simulated.
    """
    if option in (None, False, True) or option == {}:
        return [FullCheckpointing()] if option is True or option == {} else []
    if not isinstance(option, Mapping):
        raise UnsupportedError(f"checkpointing {json.dumps(option)} is not known: true, false or an object")
    which = [key for key in _CHECKPOINTS if key in option]
    unknown = sorted(set(option) - set(_CHECKPOINTS))
    if unknown or len(which) > 1:
        raise UnsupportedError(f"checkpointing {json.dumps(option)} is not simulated")
    make = _CHECKPOINTS[which[0]]
    return [make(option[which[0]])]


def freezing_strategies(option: Any) -> list[Strategy]:
    """The strategies of a case's ``freeze``: nothing, or an object that says what is frozen.

    Raises:
        UnsupportedError: a value that is not simulated.
    """
    if not option:
        return []
    if option == {"only": ["bias"]}:
        return [BitFit()]
    if not isinstance(option, Mapping) or set(option) - {"layers", "embeddings", "parts"}:
        raise UnsupportedError(f"freeze {json.dumps(option)} is not simulated")
    return [
        Freezing(
            layers=option.get("layers", 0),
            embeddings=option.get("embeddings", False),
            weights="+".join(option.get("parts", ())),
        )
    ]
