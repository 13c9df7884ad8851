"""Lowering the step of a rank in Megatron-LM's pipeline: its loop's parts, and what stays between steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from simulator.combinations import has_experts, refuse_together, regimes
from simulator.pipelines.megatron_interleaved import Interleaved
from simulator.pipelines.megatron_one_chunk import without_interleaving
from simulator.pipelines.megatron_parts import MegatronParts
from simulator.pipelines.pipeline import MegatronLoop
from simulator.plan import Plan
from simulator.program import Node, Occurrence, Seq, TreeBuilder
from simulator.runtime import Job, Runtime


class MegatronPipelinedSteps:
    """The micro-batches of an optimizer step on one rank of Megatron-LM's pipeline.

    Args:
        job: the rank.
        loop: the order of its actions, and how they are run.
        builder: makes trees of recorded steps.
        runtimes: what wraps the chunks.
    """

    def __init__(self, job: Job, loop: MegatronLoop, builder: TreeBuilder, runtimes: Sequence[Runtime]) -> None:
        _check(job.plan)
        self._loop = loop
        self._micro_batches = job.plan.training.gradient_accumulation
        self._rounds: dict[tuple[Node, ...], Seq] = {}
        self._run = MegatronParts(job, loop, builder, runtimes)

    def step(self, *, cold: bool) -> Sequence[Node]:
        """Zeroed gradients and all micro-batches; inputs of the last ones stay in their blocks, with gradients."""
        self._run.begin_step(cold=cold)
        if self._loop.chunks == 1:
            without_interleaving(self._run, self._loop, self._micro_batches)
        else:
            Interleaved(self._run, self._loop).run()
        self._run.variables.drop("total_num_tokens")
        return self._in_rounds()

    def end_step(self) -> Sequence[Node]:
        """``train_step`` returns after the optimizer, and with it go the losses it was given."""
        self._run.parts = []
        self._run.variables.drop(*(("forward_data_store", number) for number in range(self._micro_batches)))
        return _numbered(self._run.parts)

    def _in_rounds(self) -> Sequence[Node]:
        """The parts; a round of turns through all chunks that runs like another is the same node, folded once."""
        parts, turns = self._run.parts, self._run.turns
        starts = [0, *turns[:: self._loop.chunks * self._loop.group if self._loop.chunks > 1 else 1], len(parts)]
        rounds = []
        for start, end in pairwise(starts):
            alike = tuple(parts[start:end])
            rounds.append(self._rounds.setdefault(alike, Seq(tuple(_numbered(alike)))))
        return _numbered(rounds)


def _numbered(parts: Sequence[Node]) -> list[Node]:
    return [Occurrence(number, part) for number, part in enumerate(parts)]


def _check(plan: Plan) -> None:
    """Refuse what was not compared with recordings of Megatron's pipelines."""
    found = regimes(plan, "pipeline", "tensor_parallel")
    refuse_together("Megatron-LM's pipeline", [*found, *(["experts"] if has_experts(plan) else [])])
