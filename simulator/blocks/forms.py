"""How families spell their experts: how weights are laid out, and what is between both projections."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from simulator import ops
from simulator.blocks.feed_forward import activation
from simulator.graph import Tensor
from simulator.model import ExpertsSpec
from simulator.sizes import Dim
from simulator.trace import Trace


def halves_gate(t: Trace, x: Tensor, width: tuple[Dim, ...], spec: ExpertsSpec) -> Tensor:
    """`_default_apply_gate` (integrations/moe.py)."""
    with t.call("", x) as local:
        gate, up = ops.split(t, x, (x.shape[0], width), 2)
        local("gate", gate)
        local("up", up)
        with t.call("act_fn", gate):
            active = activation(t, spec.activation, gate)
        return ops.mul(t, active, up)


def clamped_gate(t: Trace, x: Tensor, width: tuple[Dim, ...], _: ExpertsSpec) -> Tensor:
    """`GptOssExperts._apply_gate` (models/gpt_oss/modeling_gpt_oss.py): gate and up alternate, and both are clamped."""
    with t.call("", x) as local:
        gate, up = (
            local(name, half)
            for name, half in zip(("gate", "up"), ops.slices(t, x, (x.shape[0], width), 2), strict=True)
        )
        gate = local("gate", ops.clamp(t, gate, bounds=1))
        up = local("up", ops.clamp(t, up))
        glu = local("glu", ops.mul(t, gate, ops.sigmoid(t, ops.mul_scalar(t, gate))))
        return ops.mul(t, ops.add_scalar(t, up), glu)


@attrs.frozen
class Form:
    """How a family spells its experts."""

    transposed: bool = False
    """Whether weights are ``[experts, in, out]``; else ``[experts, out, in]``."""
    masked: bool = True
    """Whether the loop over experts knows one more index, of tokens that go to none."""
    gate: Callable[[Trace, Tensor, tuple[Dim, ...], ExpertsSpec], Tensor] = halves_gate
    """Gate and up projections ``[rows, 2 f]`` to what goes down ``[rows, f]``."""


#: Weights ``[experts, out, in]``, gate and up side by side.
PLAIN = Form()


#: Sizes of the input and of the output of a projection.
Sizes = tuple[tuple[Dim, ...], tuple[Dim, ...]]


def projections(t: Trace, x: Tensor, spec: ExpertsSpec) -> list[tuple[str, Sizes]]:
    """Names of the weights of all experts, and what they lead from and to."""
    hidden, width, both = x.shape[-1], (t.dim("f", spec.width),), (t.dim("2f", 2 * spec.width),)
    up = ("gate_up_proj", (hidden, both)) if spec.gated else ("up_proj", (hidden, width))
    return [up, ("down_proj", (width, hidden))]


def expert_weights(t: Trace, name: str, sizes: Sizes, spec: ExpertsSpec, form: Form) -> Tensor:
    """The weights of all experts that lead from the first of `sizes` to the second."""
    axes = sizes if form.transposed else sizes[::-1]
    return t.weights(name, (t.dim("E", spec.experts),), *axes)
