"""Pipelines as the distributed oracle records them: a line tells one rank's stages and the order of its actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hardware.errors import UnsupportedError, UsageError
from simulator.pipelines.pipeline import Action
from strategies.pipeline import PipelineParallel

#: The oracle's schedules, torch's classes without ``Schedule`` -> the loop that runs them.
_RUNTIMES = {
    "GPipe": "gpipe",
    "1F1B": "1f1b",
    "Interleaved1F1B": "runtime",
    "InterleavedZeroBubble": "runtime",
    "ZBVZeroBubble": "runtime",
    "DualPipeV": "runtime",
}


def recorded_pipeline(line: Mapping[str, Any]) -> PipelineParallel:
    """The rank of a pipeline that a line was recorded on.

    Raises:
        UnsupportedError: a schedule that is not known.
        UsageError: a line without its order, such as ``F0.0 B0.0`` (kind, stage, micro-batch).
    """
    schedule = line["config"].get("schedule")
    if schedule not in _RUNTIMES:
        raise UnsupportedError(f"'schedule' {schedule!r} is not simulated, only {', '.join(_RUNTIMES)}")
    try:
        stages = tuple(line["stages"])
        order = tuple(_action(word, stages) for word in line["order"].split())
        cuts = tuple(line["layer_cuts"])
    except (KeyError, ValueError) as error:
        raise UsageError(f"a case of kind pp needs 'stages', 'layer_cuts' and 'order': {error}") from None
    return PipelineParallel(
        cuts=cuts,
        stages=stages,
        order=order,
        runtime=_RUNTIMES[schedule],
        return_outputs=bool(line["config"].get("return_outputs")),
    )


def _action(word: str, stages: tuple[int, ...]) -> Action:
    stage, micro_batch = (int(part) for part in word[1:].split("."))
    return Action(word[0], micro_batch, stages.index(stage))
