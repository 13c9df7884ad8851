"""Tensor parallelism (Shoeybi et al., arXiv:1909.08053) as ``parallelize_module`` does it, with DTensor.

Linear layers are sharded by columns, then by rows; the vocabulary of embedding and head is sharded, too. Sequence
parallelism (Korthikanti et al., arXiv:2205.05198) shards norms and residuals along the sequence; what enters a
column-parallel layer is gathered and saved whole. Follows torchtitan/models/llama3/infra/parallelize.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.graph import Storage
from simulator.limits import is_count
from simulator.mesh import LARGEST_DEGREE
from simulator.model import ModelSpec
from simulator.optimizers.step import OptimizerStep
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Hooks, Job, Runtime
from simulator.tensor_parallel import TensorParallelism

#: Families whose modules have the names of `simulator.tensor_parallel.PLANS`.
FAMILIES = {"transformers": ("llama", "gemma2"), "torchtitan": ("llama",), "plain": ("gpt2",)}


def _check_degree(_: object, attribute: attrs.Attribute[int], value: object) -> None:
    if not is_count(value, LARGEST_DEGREE):
        raise UsageError(f"{attribute.name!r} must be a whole number from 1 to {LARGEST_DEGREE}: {value!r}")


def _check_flag(_: object, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"{attribute.name!r} must be True or False: {value!r}")


@attrs.frozen
class TensorParallel:
    """Shard every layer over `degree` ranks.

    Raises:
        UsageError: a degree that is not a positive whole number, or a switch that is not one.
    """

    degree: int = attrs.field(default=1, validator=_check_degree)
    sequence_parallel: bool = attrs.field(default=False, kw_only=True, validator=_check_flag)
    """Shard norms and residuals along the sequence."""
    loss_parallel: bool = attrs.field(default=False, kw_only=True, validator=_check_flag)
    """Compute the loss on logits sharded along the vocabulary, and never gather them."""
    name: str = attrs.field(default="tensor_parallel", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with its modules sharded; `UnsupportedError` where this is not modelled or the model does not divide."""
        if plan.tensor_parallel is not None:
            raise UnsupportedError("'tensor_parallel' is in the plan already: give it once")
        self._check(plan)
        if self.degree == 1:
            return plan
        return attrs.evolve(
            plan,
            mesh=attrs.evolve(plan.mesh, tp=self.degree),
            tensor_parallel=TensorParallelism(sequence=self.sequence_parallel, loss=self.loss_parallel),
            hooks=(*plan.hooks, PlacementHooks()),
        )

    def _check(self, plan: Plan) -> None:
        implementation, family = plan.training.implementation, plan.model.family
        if family not in FAMILIES[implementation]:
            raise UnsupportedError(
                f"'tensor_parallel' of {family} needs another implementation than {implementation!r}: "
                f"{_ways_out(family)}"
            )
        outside = implementation == "torchtitan"
        for field in ("sequence_parallel", "loss_parallel") if not outside else ():
            if getattr(self, field) and not (implementation == "plain" and field == "loss_parallel"):
                raise UnsupportedError(f"{field!r} needs implementation 'torchtitan', not {implementation!r}")
        if self.loss_parallel and plan.training.autocast is not None:
            raise UnsupportedError("'loss_parallel' with autocast is not modelled: leave one out")
        for field, value in _divided(plan.model):
            self._check_divides(field, value)
        if self.sequence_parallel:
            self._check_divides("seq_len", plan.training.seq_len)

    def _check_divides(self, field: str, value: int) -> None:
        if value % self.degree:
            degrees = [d for d in range(1, value + 1) if value % d == 0]
            below = max((d for d in degrees if d < self.degree), default=1)
            above = min((d for d in degrees if d > self.degree), default=value)
            raise UnsupportedError(
                f"'tensor_parallel' degree {self.degree} must divide {field} {value}: "
                f"{below if below == above or above < self.degree else f'{below} and {above}'} do"
            )


def _ways_out(family: str) -> str:
    others = [name for name, known in FAMILIES.items() if family in known]
    return f"use {' or '.join(others)}" if others else "none is modelled"


def _divided(model: ModelSpec) -> Iterator[tuple[str, int]]:
    """What must be a multiple of the degree: DTensor views heads as whole ones, and takes shards for even ones."""
    for layer in dict.fromkeys(model.layers):
        yield "heads", layer.attention.heads
        yield "key/value heads", layer.attention.kv_heads
        yield "feed-forward width", layer.feed_forward.width


@attrs.frozen
class PlacementHooks(Hooks):
    """The optimizer redistributes gradients to the placement of their weights (torch/distributed/tensor/_dispatch.py)."""

    def start(self, job: Job) -> Runtime:
        """Set nothing up."""
        return _Placements(job)


class _Placements(Runtime):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._redistributed: list[Storage] = []

    def before_step(self, step: OptimizerStep) -> None:
        """Every gradient of another placement gets a copy, until the one fused kernel has run."""
        for parameter in step.parameters:
            op = self.job.graph.reductions.get(parameter.storage)
            if op is not None:
                weight = parameter.storage
                copy = Storage(f"{weight.label}.redistributed", weight.size, weight.dtype, Role.OPTIMIZER, weight.slot)
                step.allocate(op, copy)
                self._redistributed.append(copy)

    def after_step(self, step: OptimizerStep) -> None:
        """The kernel's arguments go."""
        step.free(self._redistributed)
        self._redistributed.clear()
