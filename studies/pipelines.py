"""From ``--pp``, ``--schedule`` and their like to the ranks of a pipeline, and the reports of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import attrs

from hardware.errors import UsageError
from simulator.limits import is_count, shown
from simulator.model import ModelSpec
from simulator.schedules.in_flight import InFlight
from simulator.schedules.schedule import LARGEST
from simulator.workload import MEGATRON
from strategies.megatron_pipeline import MegatronPipeline
from strategies.pipeline_schedule import ALIASES, PipelineSchedule

#: torchtitan's ``pipeline_parallel_schedule``, unless given.
SCHEDULE = "1f1b"
#: A pipeline in one of torch's loops, or in Megatron-LM's.
AnyPipeline = PipelineSchedule | MegatronPipeline


@attrs.frozen
class StagesOfRank:
    """What one rank of a pipeline has: whole stages, and micro-batches that it holds at once."""

    rank: int
    stages: tuple[int, ...]
    layers: tuple[range, ...]
    """Of each stage, its layers in the whole model."""
    in_flight: InFlight

    @property
    def named(self) -> list[tuple[int, range]]:
        """Each stage's number and layers."""
        return list(zip(self.stages, self.layers, strict=True))

    @property
    def layer_count(self) -> int:
        """Layers of all stages."""
        return sum(map(len, self.layers))


def pipeline_of(
    schedule: str | None, virtual_stages: int | None, split: str | None, pp: int | None, implementation: str
) -> AnyPipeline | None:
    """What the options ask for, in the loop that comes with the model's code; None without a pipeline.

    Raises:
        UsageError: an option that needs a pipeline, or one that is wrong.
    """
    given = {"schedule": schedule, "virtual-stages": virtual_stages, "pp-split": split}
    if (pp or 1) == 1:
        idle = next((name for name, value in given.items() if value is not None), None)
        if idle is not None:
            raise UsageError(f"{idle!r} changes nothing without a pipeline: give --pp, or leave it out")
        return None
    most = LARGEST["chunks"]
    if virtual_stages is not None and not is_count(virtual_stages, most):
        raise UsageError(f"'virtual-stages' must be a whole number from 1 to {most}: {shown(virtual_stages)}")
    if implementation in MEGATRON:
        return _megatron(schedule, virtual_stages, None if split is None else _numbers(split))
    found = PipelineSchedule(
        schedule=SCHEDULE if schedule is None else schedule,
        virtual_stages=virtual_stages,
        split=None if split is None else _numbers(split),
    )
    assert found.known_as
    return found


def _megatron(schedule: str | None, virtual_stages: int | None, split: tuple[int, ...] | None) -> MegatronPipeline:
    """1F1B, interleaved where a rank has several stages: Megatron-LM has no other loop."""
    pipeline = MegatronPipeline(chunks=virtual_stages or 1, split=split)
    asked = schedule and schedule.replace("-", "_")
    asked = ALIASES.get(asked, asked) if asked else None
    if asked not in (None, pipeline.known_as):
        way = "give --virtual-stages for interleaved_1f1b, and none for 1f1b"
        raise UsageError(f"'schedule' of Megatron-LM's pipelines must be {pipeline.known_as} here: {schedule}; {way}")
    return pipeline


def _numbers(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and word.isascii() and len(word) < 10 for word in words):
        raise UsageError(f"'pp-split' must be the layers of each stage, joined by commas, such as 7,8,8,9: {text!r}")
    return tuple(map(int, words))


def stages_of(pipeline: AnyPipeline, model: ModelSpec, pp: int, micro_batches: int) -> list[StagesOfRank]:
    """What each of the `pp` ranks has."""
    schedule = pipeline.made_for(pp, micro_batches)
    layers = [range(*pair) for pair in pairwise(pipeline.cuts(len(model.layers), schedule.stages))]
    found = []
    for rank in range(pp):
        stages = tuple(schedule.stage(rank, chunk) for chunk in range(schedule.chunks))
        in_flight = attrs.evolve(pipeline, rank=rank).in_flight(pp, micro_batches)
        found.append(StagesOfRank(rank, stages, tuple(layers[stage] for stage in stages), in_flight))
    return found


def assumed(pipeline: AnyPipeline, given: Sequence[str], split: Sequence[int], *, tied: bool) -> list[str]:
    """Lines for options that were not `given`, and what pipelines do that people may not expect.

    Args:
        pipeline: any rank of it.
        given: names of options.
        split: layers of each stage.
        tied: whether embedding and head are one weight in the model.
    """
    megatron = isinstance(pipeline, MegatronPipeline)
    lines = [] if "schedule" in given else [f"--schedule {pipeline.known_as}"]
    if "pp_split" not in given:
        how = "equal stages" if megatron else "torchtitan's: the embedding is a layer, so is the head"
        lines.append(f"--pp-split {','.join(map(str, split))} ({how})")
    lines.append(
        "stages run in Megatron-LM's loop: each keeps the last input that it received, and its gradient, between steps"
        if megatron
        else "stages run in torch.distributed.pipelining, which keeps a buffer to receive in for each micro-batch"
    )
    if tied:
        lines.append("the tied embedding is in two stages: each holds and trains a copy of its own")
    return lines
