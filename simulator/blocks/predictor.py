"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2, equations 21 to 25)."""

from __future__ import annotations

from collections.abc import Callable

from simulator import ops
from simulator.blocks.heads import Norm
from simulator.blocks.linear import projection
from simulator.graph import Tensor
from simulator.trace import Trace

PREDICTOR = "predictor"
"""Their module."""


def roll(t: Trace, x: Tensor) -> Tensor:
    """``torch.roll(x, -1, dims=-1)``, whose last column is then filled in place: tokens or labels ``[b, s]``."""
    return ops.constant(t, "roll.default", x)


def predictor(
    t: Trace,
    slot: int,
    hidden: Tensor,
    embeds: Tensor,
    *,
    norm: Norm,
    layer: Callable[[Tensor], Tensor],
    arguments: tuple[Tensor | None, ...],
) -> Tensor:
    """One module: what it makes of the hidden states of the depth before, ``[b, s, h]`` as they are.

    Follows Megatron-LM's `MultiTokenPredictionLayer` (megatron/core/transformer/multi_token_prediction.py):
    ``norm(layer(eh_proj(cat([enorm(embeds), hnorm(hidden)], -1))))``.

    Args:
        slot: of the layer.
        embeds: the embeddings of the tokens that follow, ``[b, s, h]``.
        norm: of the family.
        layer: one layer of the model's last kind.
        arguments: what it is called with besides hidden states.
    """
    with t.call(PREDICTOR, hidden, embeds) as local:
        with t.turn(slot):
            hidden = local("hidden", _joined(t, hidden, embeds, norm))
        with t.layer(slot, hidden, *arguments):
            hidden = local("hidden", layer(hidden))
        with t.turn(slot):
            return norm(t, "norm", hidden)


def _joined(t: Trace, hidden: Tensor, embeds: Tensor, norm: Norm) -> Tensor:
    with t.call("") as parts:
        normed = [parts("enorm", norm(t, "enorm", embeds)), parts("hnorm", norm(t, "hnorm", hidden))]
        wide = (*normed[0].shape[:-1], (t.dim("2h", 2 * t.dimensions.bindings["h"]),))
        both = ops.cat(t, normed, wide, tuple(dim for axis in wide for dim in axis))
    return projection(t, "eh_proj", both, ("h",), bias=False)
