"""What a case of the oracle says about checkpointing and freezing, in our words."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from hardware.errors import UnsupportedError
from simulator.plan import Strategy
from strategies.attention_checkpointing import AttentionCheckpointing
from strategies.bitfit import BitFit
from strategies.block_checkpointing import BlockCheckpointing
from strategies.checkpointing import FullCheckpointing
from strategies.freezing import Freezing
from strategies.interval_checkpointing import IntervalCheckpointing
from strategies.module_checkpointing import ModuleCheckpointing
from strategies.op_checkpointing import OpCheckpointing
from strategies.uniform_checkpointing import UniformCheckpointing

#: The option of a case that says what is checkpointed -> the strategy that does it.
_CHECKPOINTS: dict[str, Callable[..., Strategy]] = {
    "every": lambda value, **how: IntervalCheckpointing(n=value, **how),
    "first": lambda value, **how: BlockCheckpointing(layers=value, **how),
    "together": lambda value, **how: UniformCheckpointing(layers=value, **how),
    "modules": lambda value, **how: ModuleCheckpointing(modules="+".join(value), **how),
    "core_attention": lambda _, **how: AttentionCheckpointing(**how),
}
#: Options that say how.
_HOW = ("reentrant", "offload")


def checkpointing_strategies(option: Any) -> list[Strategy]:
    """The strategies of a case's ``checkpointing``: nothing, true (every layer), or an object that says more.

    Raises:
        UnsupportedError: a value that is not simulated.
    """
    if option in (None, False):
        return []
    said = {} if option is True else option
    if not isinstance(said, Mapping) or set(said) - set(_CHECKPOINTS) - {*_HOW, "ops"}:
        raise UnsupportedError(f"checkpointing {json.dumps(option)} is not known: true, false or an object")
    if "ops" in said:
        return [_ops(said)]
    which = [key for key in _CHECKPOINTS if key in said]
    how = {key: said[key] for key in _HOW if key in said}
    if len(which) > 1:
        raise UnsupportedError(f"checkpointing {json.dumps(option)} is not simulated: {' and '.join(which)}")
    return [_CHECKPOINTS[which[0]](said[which[0]], **how) if which else FullCheckpointing(**how)]


def _ops(said: Mapping[str, Any]) -> Strategy:
    if set(said) - {"ops", "every"} or said["ops"] not in ("torchtitan", "every_mm"):
        raise UnsupportedError(f"checkpointing {json.dumps(said)} is not simulated")
    return OpCheckpointing(n=said.get("every", 1), every_second_mm=said["ops"] == "torchtitan")


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
