"""Pipeline parallel: each rank has some of the layers, and passes hidden states on (torch.distributed.pipelining).

Technique: Huang et al., GPipe, NeurIPS 2019, arXiv:1811.06965; Narayanan et al., PipeDream-Flush, arXiv:2006.09503;
interleaved stages, arXiv:2104.04473; split backward, Qi et al., arXiv:2401.10241 and arXiv:2405.15362 (ZBV).
Behaviour: torch 2.13 torch/distributed/pipelining/stage.py and schedules.py.
"""

from __future__ import annotations

from itertools import chain, pairwise, product
from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.pipelines.pipeline import (
    BACKWARD,
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    RUNTIMES,
    Action,
    Chunk,
    Pipeline,
    Turns,
)
from simulator.plan import Plan


@attrs.frozen(kw_only=True)
class PipelineParallel:
    """One rank of a pipeline, over mesh axis ``pp``; ``gradient_accumulation`` counts the micro-batches.

    Args:
        cuts: the first layer of every stage, and the number of layers.
        stages: the stages that this rank has, in the order of its chunks.
        order: what this rank computes, one action after the other.
        runtime: which of torch's loops runs it, one of `RUNTIMES`.
        return_outputs: whether ``step`` returns the last stage's outputs.

    Raises:
        UsageError: cuts, stages or an order that do not fit one another.
    """

    cuts: tuple[int, ...]
    stages: tuple[int, ...]
    order: tuple[Action | Turns, ...]
    runtime: str = attrs.field(default="runtime", validator=attrs.validators.in_(RUNTIMES))
    return_outputs: bool = False
    name: str = attrs.field(default="pipeline", init=False)
    axis: ClassVar[str] = "pp"

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the rank's own layers."""
        self._check(plan)
        chunks = tuple(Chunk(stage, range(self.cuts[stage], self.cuts[stage + 1])) for stage in self.stages)
        layers = [plan.model.layers[index] for index in chain.from_iterable(c.layers for c in chunks)]
        kinds = [number for number, chunk in enumerate(chunks) for _ in chunk.layers]
        pipeline = Pipeline(
            plan.model, len(self.cuts) - 1, chunks, self.order, self.runtime, return_outputs=self.return_outputs
        )
        # a tied weight is in two stages: each has, trains and keeps the state of a copy of its own
        model = attrs.evolve(plan.model, layers=tuple(layers), tied_embeddings=False)
        return attrs.evolve(plan, model=model, layer_kinds=tuple(kinds), pipeline=pipeline)

    def _check(self, plan: Plan) -> None:
        before = [name for name in plan.applied if not name.startswith("prune_")]
        if before:
            raise UnsupportedError(f"{self.name} goes first, not after {', '.join(before)}: change the order")
        self._check_cuts(len(plan.model.layers))
        self._check_order(plan.training.gradient_accumulation)

    def _check_cuts(self, layers: int) -> None:
        if len(self.cuts) < 2 or (self.cuts[0], self.cuts[-1]) != (0, layers):
            raise UsageError(f"'cuts' must go from 0 to the number of layers, {layers}: {list(self.cuts)}")
        if any(end <= start for start, end in pairwise(self.cuts)):
            raise UsageError(f"'cuts' must leave every stage a layer: {list(self.cuts)}; have fewer stages")
        if not self.stages or any(stage not in range(len(self.cuts) - 1) for stage in self.stages):
            raise UsageError(f"'stages' must be among the {len(self.cuts) - 1} that 'cuts' makes: {list(self.stages)}")

    def _check_order(self, micro_batches: int) -> None:
        """Every micro-batch goes forward and then backward through every chunk, in one part or in two."""
        done: dict[tuple[int, int], str] = {}
        forwards = [0] * len(self.stages)
        for part in self.order:
            actions, count = (part.actions, part.count) if isinstance(part, Turns) else ((part,), 1)
            for action in actions:
                where = action.chunk, action.micro_batch
                done[where] = done.get(where, "") + action.kind
                forwards[action.chunk] += count * (action.kind == FORWARD)
        numbers = 1 + max((number for _, number in done), default=-1)
        wanted = set(product(range(len(self.stages)), range(numbers)))
        legal = {FORWARD + BACKWARD, FORWARD + BACKWARD_INPUT + BACKWARD_WEIGHT}
        if set(done) != wanted or not legal.issuperset(done.values()) or {*forwards} != {micro_batches}:
            way = "F then B, or F, I and W"
            raise UsageError(f"'order' must run each of {micro_batches} micro-batches through each chunk once: {way}")
