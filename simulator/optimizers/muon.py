"""Muon (Jordan et al., 2024; Liu et al., arXiv 2502.16982): momentum, orthogonalised by Newton-Schulz iterations.

As users run it, with two optimizers: ``torch.optim.Muon`` on the matrices of the layers, then ``torch.optim.AdamW``
(foreach) on all else: embeddings, the head, norms, biases and stacks of experts, which `Muon` refuses.

Source: torch/optim/_muon.py `_single_tensor_muon`, `_zeropower_via_newtonschulz` with the constructor's defaults.
"""

from __future__ import annotations

import attrs

from hardware.dtypes import BF16
from simulator.graph import Storage
from simulator.optimizers.adam import adamw
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim
from simulator.workload import Optimizer

#: torch/optim/_muon.py `DEFAULT_NS_STEPS`.
NEWTON_SCHULZ_STEPS = 5


def muon(step: OptimizerStep) -> None:
    """``Muon.step()``, then ``AdamW.step()``."""
    hidden = [parameter for parameter in step.parameters if parameter.is_hidden_matrix]
    for parameter in hidden:
        step.state(parameter, "momentum_buffer", parameter.dims, parameter.dtype, "zeros_like.default")
    for parameter in hidden:
        _update(step, parameter)
    step.finish()
    others = [parameter for parameter in step.parameters if not parameter.is_hidden_matrix]
    if others:
        adamw(step.part(others, attrs.evolve(Optimizer(), implementation="foreach")))


def _update(step: OptimizerStep, parameter: Parameter) -> None:
    """Nesterov's blend, orthogonalised in bf16; the last matrix's update lives until this one's blend is there."""
    step.read_gradients(2, [parameter])  # lerp_, lerp
    step.local("update", step.like(parameter, "lerp.Scalar"))
    if parameter.dtype != BF16:
        step.local("ortho_grad", _matrix(step, parameter, "_to_copy.default", parameter.dims))
    norm = _matrix(step, parameter, "linalg_vector_norm.default", ())
    clamped = _matrix(step, parameter, "clamp.default", ())
    step.free([norm])
    step.free([clamped])
    for iteration in range(NEWTON_SCHULZ_STEPS):
        _newton_schulz(step, parameter, iteration)
    orthogonal = step.unbind("ortho_grad")
    for name in ("gram_matrix", "gram_update"):
        step.local(name, None)
    step.local("update", orthogonal)


def _newton_schulz(step: OptimizerStep, parameter: Parameter, iteration: int) -> None:
    """One iteration: the Gram matrix of the shorter side, a polynomial of it, and the product with the update.

    Each is made while that of the iteration before still has its name.
    """
    rows, columns = step.sides(parameter)
    side = min((rows, columns), key=step.count)
    for name, op, dims in (
        ("gram_matrix", "mm.default", (*side, *side)),
        ("gram_update", "addmm.default", (*side, *side)),
        ("ortho_grad", "addmm.default", parameter.dims),
    ):
        step.local(name, _matrix(step, parameter, op, dims, f"{name}.{iteration}"))


def _matrix(
    step: OptimizerStep, parameter: Parameter, op: str, dims: tuple[Dim, ...], name: str | None = None
) -> Storage:
    return step.temporary(parameter, op, dims, BF16, name)
