"""Liger-Kernel's cross-entropies, whose gradients are made in forward: of the logits, or of head and loss at once."""

from __future__ import annotations

from hardware.dtypes import BOOL, FP32
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor
from simulator.ops.elementwise import constant
from simulator.sizes import Dim, product
from simulator.trace import Frame, Trace

Gradients = list[Tensor | None]


def liger_cross_entropy(t: Trace, logits: Tensor, targets: Tensor) -> Tensor:
    """`LigerCrossEntropyFunction` (ops/cross_entropy.py): the kernel writes the gradient over the logits.

    Args:
        t: the trace.
        logits: ``[b s, V]``.
        targets: shifted labels ``[b, s]``.
    """
    rows = (logits.shape[0],)
    with t.call("") as local:
        losses = local("loss_1d", constant(t, "zeros.default", logits, shape=rows))
        _count_targets(t, local, targets, rows)
        for bound in ("max.default", "min.default"):  # the targets are looked at before the kernel uses them
            constant(t, bound, constant(t, "mul.Tensor", targets, shape=rows), shape=())
        return _sum(t, [logits, losses], [logits])


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
        _count_targets(t, local, targets, (tokens,))
        for chunk in _chunks(t, tokens, weight):
            _chunk(t, local, x, weight, chunk)
        return _sum(t, [x, weight, losses], [for_x, for_weight])


def _count_targets(t: Trace, local: Frame, targets: Tensor, rows: Shape) -> None:
    local("target_mask", constant(t, "ne.Scalar", targets, dtype=BOOL, shape=rows))
    constant(t, "sum.default", targets, shape=())


def _sum(t: Trace, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """The loss of all tokens: one node, which saves the gradients of its first inputs when forward has returned."""
    loss = t.fresh("sum.default", (), FP32)
    t.emit("sum.default", inputs, [loss], saves=gradients, backward=_backward, gradients=gradients)
    t.graph.ops[-1].saves_late = True
    return loss


def _backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Hands out what forward saved, scaled in place unless the gradient of the loss is one.

    It was detached, so it is no view: a tied weight's other gradient is added to it in place.
    """
    engine.free(engine.fresh("lift_fresh.default", (), FP32))
    return [*(engine.overwritten("element_mul", x) for x in op.attributes["gradients"]), None]


def _chunks(t: Trace, tokens: tuple[Dim, ...], weight: Tensor) -> list[str]:
    """Dimensions of the chunks of tokens, so many that a chunk's logits are about as big as all hidden states.

    From the second on whole chunks leave memory as they found it, so two of them stand for all.
    """
    bindings = t.dimensions.bindings
    total, vocabulary, hidden = (int(product(dims, bindings)) for dims in (tokens, *weight.shape))
    ratio = -(-vocabulary // hidden)
    size = 1 << (-(-total // ratio) - 1).bit_length()  # the next power of two
    whole, rest = divmod(total, size)
    names = [t.dim("chunk", size)] * min(whole, 2)
    return [*names, t.dim("last_chunk", rest)] if rest else names


def _chunk(t: Trace, local: Frame, x: Tensor, weight: Tensor, chunk: str) -> None:
    """One turn of the loop: the names of the logits still hold those of the turn before while new ones are made."""
    rows = ((chunk,), x.shape[1])
    with t.call("") as matmul:  # autocast casts both factors; a transposed weight is no leaf, so its copy is not kept
        matmul("input", _low(t, x, rows))
        matmul("weight", _low(t, weight, weight.shape))
        low = t.regime.autocast or x.dtype
        logits = local("logits_chunk", constant(t, "mm.default", x, dtype=low, shape=((chunk,), weight.shape[0])))
    local("grad_logits_chunk", logits)  # the kernel overwrites the logits
    _keep_cast(t, weight)
    constant(t, "mm.default", logits, shape=rows)  # copied into the rows of grad_input
    local("grad_logits_t", logits)  # until here this name held the logits of the turn before, too
    if low != weight.dtype and t.regime.torch >= (2, 8):
        local("input_chunk", _low(t, x, rows))
        return  # ``torch.addmm(..., out_dtype=torch.float32, out=grad_weight)``
    with t.call("") as matmul:
        matmul("input", _low(t, x, rows))
        share = constant(t, "mm.default", logits, shape=weight.shape)
    if share.dtype != FP32:  # ``grad_weight += torch.mm(...).float()``
        constant(t, "_to_copy.default", share, dtype=FP32)


def _low(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """A copy of (rows of) `x` in autocast's type; outside autograd, inside a function of its own."""
    low = t.regime.autocast
    return x if low is None or x.dtype == low else constant(t, "_to_copy.default", x, dtype=low, shape=shape)


def _keep_cast(t: Trace, weight: Tensor) -> None:
    """Autocast's copy of the weight itself, which it keeps until it ends."""
    if t.regime.autocast is not None and t.cached_cast(weight) is None:
        cast = _low(t, weight, weight.shape)
        cast.storage.cached_by_autocast = True
        t.remember_cast(weight, cast)
