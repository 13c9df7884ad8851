"""Liger-Kernel's cross-entropy fused with the language head: gradients in forward, chunk by chunk."""

from __future__ import annotations

from hardware.dtypes import BOOL, FP32, INT64
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.ops.elementwise import constant
from simulator.sizes import Dim, product
from simulator.trace import Frame, Trace

Gradients = list[Tensor | None]


def liger_linear_cross_entropy(t: Trace, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`LigerFusedLinearCrossEntropyFunction` (ops/fused_linear_cross_entropy.py), ``accum_dtype=None``.

    Args:
        t: the trace.
        x: hidden states ``[b s, h]``.
        weight: of the language head, ``[V, h]``.
        targets: shifted labels ``[b, s]``.

    Returns:
        the loss; kept for backward are both gradients, as big as `x` and as `weight`, instead of logits.
    """
    tokens = x.shape[0]
    with t.call("") as local:
        for_x = local("grad_input", constant(t, "zeros_like.default", x))
        for_weight = local("grad_weight", constant(t, "zeros_like.default", weight))
        losses = local("loss_1d", constant(t, "zeros.default", x, dtype=FP32, shape=(tokens,)))
        local("target_mask", constant(t, "ne.Scalar", targets, dtype=BOOL))
        constant(t, "sum.default", targets, dtype=INT64, shape=())
        for chunk in _chunks(t, tokens, weight):
            _chunk(t, local, x, weight, chunk)
        loss = t.fresh("sum.default", (), FP32)
        saves = [for_x, for_weight]
        t.emit("sum.default", [x, weight, losses], [loss], saves=saves, backward=_backward, gradients=saves)
        t.graph.ops[-1].saves_late = True
        return loss


def _chunks(t: Trace, tokens: tuple[Dim, ...], weight: Tensor) -> list[str]:
    """Dimensions of the chunks of tokens, so many that a chunk's logits are about as big as all hidden states."""
    bindings = t.dimensions.bindings
    total, vocabulary, hidden = (int(product(dims, bindings)) for dims in (tokens, *weight.shape))
    ratio = -(-vocabulary // hidden)
    size = 1 << (-(-total // ratio) - 1).bit_length()  # the next power of two
    whole, rest = divmod(total, size)
    names = [t.dim("chunk", size)] * whole
    return [*names, t.dim("last_chunk", rest)] if rest else names


def _chunk(t: Trace, local: Frame, x: Tensor, weight: Tensor, chunk: str) -> None:
    """One turn of the loop: the names of the logits still hold those of the turn before while new ones are made."""
    logits = local("logits_chunk", constant(t, "mm.default", x, shape=((chunk,), weight.shape[0])))
    local("grad_logits_chunk", logits)  # the kernel overwrites the logits
    constant(t, "mm.default", logits, shape=((chunk,), x.shape[1]))  # copied into the rows of grad_input
    share = constant(t, "mm.default", logits, shape=weight.shape)
    if share.dtype != FP32:  # ``grad_weight += torch.mm(...).float()``
        constant(t, "_to_copy.default", share, dtype=FP32)


def _backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Hands out what forward saved, scaled in place unless the gradient of the loss is one."""
    engine.free(engine.fresh("lift_fresh.default", (), FP32))
    found = [engine.overwritten("element_mul", x) for x in op.attributes["gradients"]]
    return [*(engine.view(x, x.shape) for x in found), None]
