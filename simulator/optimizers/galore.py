"""GaLore (Zhao et al., arXiv 2403.03507, algorithm 2): Adam in a subspace that a singular value decomposition finds.

Source: galore-torch 1.0, galore_torch/adamw.py `AdamW.step` and galore_projector.py `GaLoreProjector`. Each step that
is simulated renews the projections, as the first does and then every ``update_proj_gap``-th: other steps need less.
"""

from __future__ import annotations

from hardware.dtypes import FP32, INT32
from simulator.graph import Storage
from simulator.optimizers.low_rank import Projection, low_rank_adamw
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim

SVD = "_linalg_svd.default"


def galore_adamw(step: OptimizerStep) -> None:
    """``GaLoreAdamW.step``."""
    low_rank_adamw(step, _renew, _project_back, clamped=True)  # there are no more singular vectors


def _renew(step: OptimizerStep, parameter: Parameter, projection: Projection) -> None:
    """`get_orthogonal_matrix`: of fp32 gradients a view, which keeps all singular vectors; else a copy of the first."""
    is_copy = parameter.dtype != FP32
    made = [_part(step, parameter, "_to_copy.default", parameter.dims, "matrix")] if is_copy else []
    decomposed, replaced = _decompose(step, parameter, projection, keep=not is_copy)
    scales = _part(step, parameter, "diag_embed.default", (projection.rank, projection.rank), "scales")
    made += [*decomposed, _part(step, parameter, "mm.default", _scaled(projection), "scaled vectors")]
    step.free([scales])
    if is_copy:
        dims = projection.matrix
        replaced = step.renewed_state(parameter, "ortho_matrix", dims, parameter.dtype, "_to_copy.default")
    step.free([*made, *replaced])


def _decompose(
    step: OptimizerStep, parameter: Parameter, projection: Projection, *, keep: bool
) -> tuple[list[Storage], list[Storage]]:
    """``torch.linalg.svd``: what goes when the function returns, and what the kept vectors replace.

    The kernel works on a copy (aten/src/ATen/native/cuda/linalg/BatchLinearAlgebraLib.cpp `svd_cusolver`). What
    cuSOLVER asks for besides is not known.
    """
    made, replaced = [], []
    for name, dims, is_kept in (
        ("U", (*projection.rows, *projection.short), keep and not projection.right),
        ("s", projection.short, False),
        ("Vh", (*projection.short, *projection.columns), keep and projection.right),
    ):
        if is_kept:
            replaced = step.renewed_state(parameter, "ortho_matrix", dims, FP32, SVD)
        else:
            made.append(_part(step, parameter, SVD, dims, name))
    info = step.workspace(parameter, SVD, (), INT32, "info")
    step.free([*info, *step.workspace(parameter, SVD, parameter.dims, FP32, "column-major matrix")])
    return made, replaced


def _scaled(projection: Projection) -> tuple[Dim, ...]:
    """The other side's singular vectors times their values, which are made and not used."""
    return (*projection.rows, projection.rank) if projection.right else (projection.rank, *projection.columns)


def _project_back(step: OptimizerStep, parameter: Parameter, _: Projection) -> None:
    full = step.like(parameter, "mm.default", "full_rank_grad")
    step.local("norm_grad", step.like(parameter, "mul.Tensor", "norm_grad (full)"))
    step.free([full])


def _part(step: OptimizerStep, parameter: Parameter, op: str, dims: tuple[Dim, ...], name: str) -> Storage:
    return step.temporary(parameter, op, dims, FP32, name)
