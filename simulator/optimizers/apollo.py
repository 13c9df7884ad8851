"""APOLLO (Zhu et al., arXiv 2412.05270, algorithm 1): Adam's step size per channel or tensor, from a random subspace.

Source: apollo-torch 1.0.3, apollo_torch/apollo.py `AdamW.step` with ``proj="random"`` and its other defaults, and
random_projector.py `GradientProjector`. Each step that is simulated renews the projections, as the first does and then
every ``update_proj_gap``-th: other steps need less. Norms grow by less than what the limiter allows.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.graph import Storage
from simulator.optimizers.low_rank import Projection, low_rank_adamw
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim


def apollo_adamw(step: OptimizerStep) -> None:
    """``APOLLOAdamW.step``."""
    low_rank_adamw(step, _renew, _rescale, clamped=False)


def _renew(step: OptimizerStep, parameter: Parameter, projection: Projection) -> None:
    """`get_orthogonal_matrix`: random numbers in fp32; the gradient is cast for its element type only."""
    is_copy = parameter.dtype != FP32
    matrix = [step.temporary(parameter, "_to_copy.default", parameter.dims, FP32, "matrix")] if is_copy else []
    drawn = step.temporary(parameter, "randn.default", projection.matrix, FP32)
    if is_copy:
        divided = step.temporary(parameter, "div.Tensor", projection.matrix, FP32, "proj")
        step.free([drawn])
        replaced = _matrix(step, parameter, projection, "_to_copy.default")
        step.free([divided])
    else:
        replaced = _matrix(step, parameter, projection, "div.Tensor")
        step.free([drawn])
    step.free([*matrix, *replaced])


def _matrix(step: OptimizerStep, parameter: Parameter, projection: Projection, op: str) -> list[Storage]:
    return step.renewed_state(parameter, "ortho_matrix", projection.matrix, parameter.dtype, op)


def _rescale(step: OptimizerStep, parameter: Parameter, projection: Projection) -> None:
    """The gradient times how much Adam rescales the projected one, kept from growing too fast."""
    channels = projection.long if step.optimizer.scale_type == "channel" else ()
    step.local("grad_scaling_factor", _ratio(step, parameter, channels))
    step.local("scaled_grad", step.like(parameter, "mul.Tensor", "scaled gradient"))
    _limit_growth(step, parameter)
    step.local("norm_grad", None)  # the scaled gradient itself


def _ratio(step: OptimizerStep, parameter: Parameter, channels: tuple[Dim, ...]) -> Storage:
    over = _part(step, parameter, "linalg_vector_norm.default", channels, "normalised norm")
    under = _part(step, parameter, "linalg_vector_norm.default", channels, "norm")
    shifted = _part(step, parameter, "add.Tensor", channels, "shifted norm")
    step.free([under])
    ratio = _part(step, parameter, "div.Tensor", channels, "grad_scaling_factor")
    step.free([over, shifted])
    return ratio


def _limit_growth(step: OptimizerStep, parameter: Parameter) -> None:
    """The norm-growth limiter; the first step has no norm to compare with."""
    if not step.has_state(parameter, "scaled_grad"):
        step.state(parameter, "scaled_grad", (), parameter.dtype, "linalg_vector_norm.default")
        return
    step.local("scaled_grad_norm", _part(step, parameter, "linalg_vector_norm.default", (), "scaled_grad_norm"))
    shifted = _part(step, parameter, "add.Tensor", (), "shifted")
    growth = _part(step, parameter, "div.Tensor", (), "growth")
    step.free([shifted])
    step.free([_part(step, parameter, "lt.Scalar", (), "is greater"), growth])
    step.local("scaled_grad", step.like(parameter, "div.Tensor", "limited gradient"))
    step.free(step.renewed_state(parameter, "scaled_grad", (), parameter.dtype, "div.Tensor"))


def _part(step: OptimizerStep, parameter: Parameter, op: str, dims: tuple[Dim, ...], name: str) -> Storage:
    return step.temporary(parameter, op, dims, parameter.dtype, name)
