"""Table look-up."""

from __future__ import annotations

from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.trace import Trace

Gradients = list[Tensor | None]


def embedding(t: Trace, weight: Tensor, indices: Tensor) -> Tensor:
    """``torch.nn.functional.embedding``: saves the indices; its gradient is as big as the whole table."""
    out = t.fresh("embedding.default", (*indices.shape, weight.shape[1]), weight.dtype)
    t.emit("embedding.default", [weight, indices], [out], saves=[indices], backward=_embedding_backward)
    return out


def _embedding_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    weight = op.inputs[0]
    return [engine.fresh("embedding_dense_backward.default", weight.shape, weight.dtype), None]
