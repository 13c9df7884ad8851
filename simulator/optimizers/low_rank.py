"""AdamW on gradients projected to few rows or columns: what GaLore and APOLLO have in common.

Both project the matrices of the layers, as with ``optim_target_modules=["attn", "mlp"]`` of transformers' Trainer, and
update all other weights first. The moments have the size of the projected gradient, whose longer side stays.

Source: galore_torch/adamw.py and apollo_torch/apollo.py `AdamW.step`, which are alike up to the normalised gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim


@attrs.frozen
class Projection:
    """How the gradient of one matrix is projected (``proj_type="std"``)."""

    right: bool
    """Whether columns are projected, being no more than rows."""
    rows: tuple[Dim, ...]
    columns: tuple[Dim, ...]
    short: tuple[Dim, ...]
    """Dimensions of the shorter side."""
    rank: Dim

    @property
    def matrix(self) -> tuple[Dim, ...]:
        """Dimensions of what projects."""
        return (self.rank, *self.columns) if self.right else (*self.rows, self.rank)

    @property
    def projected(self) -> tuple[Dim, ...]:
        """Dimensions of the projected gradient."""
        return (*self.rows, self.rank) if self.right else (self.rank, *self.columns)

    @property
    def long(self) -> tuple[Dim, ...]:
        """Dimensions of the longer side."""
        return self.rows if self.right else self.columns


#: Works on one projected weight.
Rule = Callable[[OptimizerStep, Parameter, Projection], None]


def low_rank_adamw(step: OptimizerStep, renew: Rule, rescale: Rule, *, clamped: bool) -> None:
    """``AdamW.step`` of either package: one parameter after the other; names live on into the next one's turn.

    Args:
        renew: makes what projects a gradient, or renews it.
        rescale: makes the update in local ``norm_grad``.
        clamped: whether a matrix with fewer rows or columns than the rank is projected to as many as it has.
    """
    for parameter in (p for p in step.parameters if not p.is_hidden_matrix):
        step.local("grad", None)  # the gradient itself
        _normalise(step, parameter, parameter.dims)
    for parameter in (p for p in step.parameters if p.is_hidden_matrix):
        projection = _projection(step, parameter, clamped=clamped)
        step.local("grad", None)
        renew(step, parameter, projection)
        step.local(
            "grad", step.temporary(parameter, "mm.default", projection.projected, parameter.dtype, "low_rank_grad")
        )
        _normalise(step, parameter, projection.projected)
        rescale(step, parameter, projection)


def _projection(step: OptimizerStep, parameter: Parameter, *, clamped: bool) -> Projection:
    rows, columns = step.sides(parameter)
    right = step.count(rows) >= step.count(columns)
    short = columns if right else rows
    rank = min(step.optimizer.rank, step.count(short)) if clamped else step.optimizer.rank
    return Projection(right, rows, columns, short, step.dimension("rank", rank))


def _normalise(step: OptimizerStep, parameter: Parameter, dims: tuple[Dim, ...]) -> None:
    """Moments of the gradient that has `dims`, and the first over the root of the second."""
    for moment in ("exp_avg", "exp_avg_sq"):
        step.state(parameter, moment, dims, parameter.dtype, "zeros_like.default")
    for name, op in (("denom", "sqrt.default"), ("norm_grad", "div.Tensor")):
        made: Storage = step.temporary(parameter, op, dims, parameter.dtype, name)
        step.local(name, made)
