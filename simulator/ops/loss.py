"""Cross-entropy as torch runs it: log-softmax over the vocabulary, then negative log-likelihood."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.ops.elementwise import to, unary
from simulator.trace import Trace

Gradients = list[Tensor | None]


def log_softmax(t: Trace, logits: Tensor) -> Tensor:
    """``torch.log_softmax``: saves its output."""
    x = to(t, logits, FP32) if t.regime.autocast else logits
    return unary(t, "_log_softmax.default", x, ("_log_softmax_backward_data.default",), saves="output")


def nll_loss(t: Trace, log_probabilities: Tensor, targets: Tensor) -> Tensor:
    """``torch.nn.functional.nll_loss``, mean over the targets: its gradient is as big as the log-probabilities."""
    loss = t.fresh("nll_loss_forward.default", (), log_probabilities.dtype)
    weight = t.fresh("nll_loss_forward.total_weight", (), log_probabilities.dtype)
    saves = [log_probabilities, targets, weight]
    inputs = [log_probabilities, targets]
    t.emit("nll_loss_forward.default", inputs, [loss, weight], saves=saves, backward=_nll_loss_backward)
    return loss


def _nll_loss_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x = op.inputs[0]
    return [engine.fresh("nll_loss_backward.default", x.shape, x.dtype), None]
