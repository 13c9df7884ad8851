"""Table look-up."""

from __future__ import annotations

from hardware.dtypes import BOOL
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor
from simulator.ops.elementwise import constant
from simulator.sizes import Dim
from simulator.trace import Frame, Trace

Gradients = list[Tensor | None]


def embedding(t: Trace, weight: Tensor, indices: Tensor) -> Tensor:
    """``torch.nn.functional.embedding``: saves the indices; its gradient is as big as the whole table."""
    out = t.fresh("embedding.default", (*indices.shape, weight.shape[1]), weight.dtype)
    t.emit("embedding.default", [weight, indices], [out], saves=[indices], backward=_embedding_backward)
    return out


def vocabulary_embedding(t: Trace, weight: Tensor, indices: Tensor, rows: tuple[Dim, ...]) -> Tensor:
    """``embedding`` on a shard of `rows`: ids of other ranks' rows are masked, the result is partial.

    The ids are replicated, so every rank makes the gradient of the whole table
    (torch/distributed/tensor/_ops/_embedding_ops.py; placement_types.py `_MaskPartial._partition_value`).
    """
    out = t.fresh("embedding.default", (*indices.shape, weight.shape[1]), weight.dtype)
    with t.call("") as local:
        inputs = [weight, vocabulary_mask(t, indices, local), indices]
        t.emit("embedding.default", inputs, [out], saves=[indices], backward=_whole_backward, rows=rows)
    return out


def vocabulary_mask(t: Trace, indices: Tensor, frame: Frame) -> Tensor:
    """Indices into this rank's rows; the boolean mask of other ranks' lives in `frame`, until the result is masked."""
    with t.call("") as bounds:
        for name in ("lt", "ge"):
            bounds(name, constant(t, f"{name}.Scalar", indices, dtype=BOOL))
        frame("mask", constant(t, "__or__.Tensor", indices, dtype=BOOL))
    return constant(t, "sub.Tensor", constant(t, "clone.default", indices))


def _whole_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    weight = op.inputs[0]
    shape = (op.attributes["rows"], weight.shape[1])
    return [engine.fresh("embedding_dense_backward.default", shape, weight.dtype), None, None]


def _embedding_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    weight = op.inputs[0]
    return [engine.fresh("embedding_dense_backward.default", weight.shape, weight.dtype), None]
