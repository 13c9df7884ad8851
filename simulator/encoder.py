"""What encoders have beside the blocks of decoders: masks that hide padding only, heads with a loss of their own."""

from __future__ import annotations

from simulator import ops
from simulator.graph import Tensor, flat
from simulator.trace import Trace


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
