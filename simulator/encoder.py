"""What encoders have beside the blocks of decoders: masks that hide padding only, heads with a loss of their own."""

from __future__ import annotations

from hardware.dtypes import BOOL, INT64
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.masks import positions
from simulator.trace import Trace


def bidirectional_mask(t: Trace, like: Tensor) -> Tensor | None:
    """The 4-D mask ``[b, 1, s, s]`` that hides padding; none where nothing is padded, a mask of ones included.

    Source: masking_utils.py `create_bidirectional_mask`, `_ignore_bidirectional_mask_sdpa`.

    Args:
        t: the trace.
        like: hidden states, whose dtype the mask of eager attention has; SDPA's is boolean.
    """
    if t.regime.attention_mask != "padded" or t.regime.attention == "flash_attention_2":
        return None
    full = (("b",), ("s",), ("s",))
    with t.call("") as local:
        for name, shape in (("batch", (("b",),)), ("head", ())):
            local(name, ops.constant(t, "arange.default", like, dtype=INT64, shape=shape))
        for name in ("query", "key"):
            local(name, positions(t, like))
        allowed = local("allowed", ops.constant(t, "ge.Scalar", like, dtype=BOOL, shape=(("s",), ())))
        allowed = local("allowed", ops.constant(t, "bitwise_and.Tensor", allowed, shape=full))
        if t.regime.attention != "eager":
            return allowed
        return ops.constant(t, "where.self", allowed, dtype=like.dtype)


def cross_entropy(t: Trace, logits: Tensor, labels: Tensor) -> Tensor:
    """``CrossEntropyLoss()(logits.view(-1, classes), labels.view(-1))``, in the dtype of `logits`.

    Args:
        t: the trace.
        logits: ``[..., classes]``.
        labels: int64 of all axes but the last.
    """
    with t.loss_head():
        rows = ops.reshape(t, logits, (flat(logits.shape[:-1]), logits.shape[-1]))
        with t.call("", rows) as local:
            return ops.nll_loss(t, local("input", ops.log_softmax(t, rows)), labels)
