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
#: The weights of a stage are gathered, or freed again, where they are sharded.
UNSHARD, RESHARD = "unshard", "reshard"


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

    def later(self, micro_batches: int) -> Action:
        """The same, so many micro-batches further on."""
        return Action(self.kind, self.micro_batch + micro_batches, self.chunk) if micro_batches else self


@attrs.frozen
class Turns:
    """Actions that a rank runs `count` times, one turn after the other; it goes on as after the first turn.

    The micro-batches of the further turns have no numbers: what comes later is numbered as if they were not there.
    """

    actions: tuple[Action, ...]
    count: int

    @property
    def balanced(self) -> bool:
        """Whether as many micro-batches end in a turn as begin in it."""
        kinds = [action.kind for action in self.actions]
        return kinds.count(FORWARD) == kinds.count(BACKWARD) + kinds.count(BACKWARD_WEIGHT)

    def later(self, micro_batches: int) -> Turns:
        """The same, so many micro-batches further on."""
        return Turns(tuple(action.later(micro_batches) for action in self.actions), self.count)


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
    order: tuple[Action | Turns, ...]
    runtime: str
    """The loop of torch that runs the order, one of `RUNTIMES`."""
    return_outputs: bool = False
    """Whether the last stage's outputs are kept and merged (``step(return_outputs=True)``)."""
    megatron: MegatronLoop | None = None
    """Megatron-LM's loop, where that runs the order instead of one of torch's."""

    @property
    def actions(self) -> list[Action]:
        """All actions that have numbers, in order."""
        return [a for part in self.order for a in (part.actions if isinstance(part, Turns) else (part,))]

    @property
    def numbered(self) -> int:
        """How many micro-batches have numbers in `order`."""
        return 1 + max((action.micro_batch for action in self.actions), default=-1)

    @property
    def splits_backward(self) -> bool:
        """Whether a backward for inputs alone is among the actions."""
        return any(action.kind == BACKWARD_INPUT for action in self.actions)

    @property
    def layers(self) -> list[int]:
        """The rank's layers, by their number in the whole model."""
        return [layer for chunk in self.chunks for layer in chunk.layers]

    def runs_like(self, other: Pipeline) -> bool:
        """Whether another rank's stages have the same parts and neighbours; their order and numbers may differ."""
        chunks = range(len(self.chunks))
        return len(chunks) == len(other.chunks) and all(
            self.stage_of(chunk) == other.stage_of(chunk)
            and self.previous_is_here(chunk) == other.previous_is_here(chunk)
            and self.next_is_here(chunk) == other.next_is_here(chunk)
            and len(self.chunks[chunk].layers) == len(other.chunks[chunk].layers)
            for chunk in chunks
        )

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
