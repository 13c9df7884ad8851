"""Pipelines: which parts of the model one rank has, and the order in which it computes them.

A rank has one part of the model (a chunk) or several; each chunk is one stage of the pipeline. Memory follows
torch 2.13's torch/distributed/pipelining (stage.py, schedules.py).
"""

from __future__ import annotations

import attrs

from simulator.model import ModelSpec

#: The dimension that counts the micro-batches of a step.
MICRO_BATCHES = "micro_batches"
#: Forward, full backward, backward for the inputs alone, and later for the weights (torch's letters).
FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = "F", "B", "I", "W"


@attrs.frozen
class Action:
    """One computation of a rank.

    Attributes:
        kind: what is computed, one of torch's letters.
        micro_batch: of which micro-batch of the step.
        chunk: on which of the rank's chunks, from 0 on.
    """

    kind: str
    micro_batch: int
    chunk: int = 0


@attrs.frozen
class Stage:
    """The part of the model that a recipe is asked for: an end of the model is there or not."""

    first: bool = True
    """Whether it embeds the tokens; else hidden states are received."""
    last: bool = True
    """Whether it has the final norm, the head and the loss; else hidden states are sent."""


@attrs.frozen
class Chunk:
    """One stage of the pipeline on a rank."""

    stage: int
    """Its number, of all stages."""
    layers: range
    """Which layers of the whole model it has."""


@attrs.frozen
class MegatronLoop:
    """How Megatron-LM's own loop runs the order (megatron/core/pipeline_parallel/schedules.py)."""

    order: tuple[Action, ...]
    """The rank's forwards and backwards."""
    chunks: int
    """How many of the model the rank has."""
    rank: int
    """The pipeline rank."""
    ranks: int
    group: int
    """Micro-batches that run through one chunk before the next (``microbatch_group_size_per_vp_stage``)."""
    overlap_p2p_comm: bool
    """Whether sends and receives overlap with computation; only where chunks are interleaved."""
    deallocate_pipeline_outputs: bool
    """Whether an output that was sent keeps one element only."""


@attrs.frozen
class Pipeline:
    """What one rank of a pipeline has and does."""

    whole: ModelSpec
    """The model before it was cut."""
    stages: int
    """How many stages there are."""
    chunks: tuple[Chunk, ...]
    order: tuple[Action, ...]
    runtime: str
    """The loop of torch that runs the order, one of `RUNTIMES`."""
    return_outputs: bool = False
    """Whether the last stage's outputs are kept and merged (``step(return_outputs=True)``)."""
    megatron: MegatronLoop | None = None
    """Megatron-LM's loop, where that runs the order instead of one of torch's."""

    @property
    def layers(self) -> list[int]:
        """The rank's layers, by their number in the whole model."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    def stage_of(self, chunk: int) -> Stage:
        """Which ends of the model a chunk has."""
        number = self.chunks[chunk].stage
        return Stage(number == 0, number == self.stages - 1)

    def next_is_here(self, chunk: int) -> int | None:
        """The rank's own chunk that continues `chunk`: what one hands to the other is not sent."""
        wanted = self.chunks[chunk].stage + 1
        return next((index for index, each in enumerate(self.chunks) if each.stage == wanted), None)

    def previous_is_here(self, chunk: int) -> int | None:
        """The rank's own chunk that `chunk` continues."""
        wanted = self.chunks[chunk].stage - 1
        return next((index for index, each in enumerate(self.chunks) if each.stage == wanted), None)


#: `ScheduleGPipe`, `Schedule1F1B` and `_PipelineScheduleRuntime`, in which all others are run.
RUNTIMES = ("gpipe", "1f1b", "runtime")
