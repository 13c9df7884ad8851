"""Ops that pick elements by index: their gradients are scattered into zeros."""

from __future__ import annotations

from hardware.dtypes import INT64
from simulator.autograd import Autograd
from simulator.graph import BackwardRule, Op, Shape, Tensor
from simulator.ops.elementwise import constant
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]


def top_k(t: Trace, x: Tensor, kept: Axis, name: str = "topk") -> tuple[Tensor, Tensor]:
    """``torch.topk`` over the last axis: `kept` values and their int64 indices, which are saved."""
    shape = (*x.shape[:-1], kept)
    values, indices = t.fresh(f"{name}.values", shape, x.dtype), t.fresh(f"{name}.indices", shape, INT64)
    backward = _scatter("scatter.src")
    t.emit(f"{name}.default", [x], [values, indices], saves=[indices], backward=backward, **_subclasses(t))
    return values, indices


def largest(t: Trace, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x.max(dim=-1, keepdim=True)``: values and indices."""
    return top_k(t, x, (), "max")


def top_k_constant(t: Trace, x: Tensor, kept: Axis) -> tuple[Tensor, Tensor]:
    """``torch.topk`` for its indices alone: no gradient flows through the values."""
    shape = (*x.shape[:-1], kept)
    outputs = [t.fresh("topk.values", shape, x.dtype), t.fresh("topk.indices", shape, INT64)]
    values, indices = t.emit("topk.default", [x], outputs)
    return values, indices


def gather(t: Trace, x: Tensor, indices: Tensor) -> Tensor:
    """``x.gather(1, indices)``: saves both, `x` for its shape (derivatives.yaml `gather`)."""
    out = t.fresh("gather.default", indices.shape, x.dtype)
    backward = _scatter("scatter_add.default")
    t.emit("gather.default", [x, indices], [out], saves=[x, indices], backward=backward, **_subclasses(t))
    return out


def scattered(t: Trace, like: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``torch.full_like(like, number).scatter_(1, indices, values)``."""
    out = constant(t, "full_like.default", like)
    inputs, saves = [out, indices, values], [indices]
    view = t.view(out, out.shape)
    return t.emit("scatter_.src", inputs, [view], saves=saves, backward=_gather_backward)[0]


def _gather_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    values = op.inputs[2]
    return [None, None, engine.fresh("gather.default", values.shape, values.dtype)]


def index(t: Trace, x: Tensor, indices: Tensor) -> Tensor:
    """``x[indices]``, rows of `x` for a vector of `indices`, which are saved."""
    out = t.fresh("index.Tensor", (*indices.shape, *x.shape[1:]), x.dtype)
    backward = _scatter("index_put.default")
    t.emit("index.Tensor", [x, indices], [out], saves=[indices], backward=backward, **_subclasses(t))
    return out


def index_elements(t: Trace, x: Tensor, indices: Tensor) -> Tensor:
    """``x[rows, columns]``: one element of `x` ``[n, m]`` for every pair of indices, which are one storage."""
    out = t.fresh("index.Tensor", indices.shape, x.dtype)
    backward = _scatter("index_put.default")
    t.emit("index.Tensor", [x, indices], [out], saves=[indices], backward=backward, **_subclasses(t))
    return out


def index_add(t: Trace, x: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """``x.index_add_(0, indices, rows)``: saves both, the rows for their shape (derivatives.yaml `index_add`)."""
    out = t.view(x, x.shape)
    inputs = [x, indices, rows]
    return t.emit("index_add_.default", inputs, [out], saves=[indices, rows], backward=_index_add_backward)[0]


def _index_add_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    rows = op.inputs[2]
    return [gradient, None, engine.fresh("index_select.default", rows.shape, rows.dtype)]


def take_row(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """``x[..., [i], :]``, indexing with a list of one: a copy, and an index on the device that is saved."""
    with t.call("") as local:
        index = local("index", t.fresh("_to_copy.default", ((),), INT64))
        t.emit("_to_copy.default", [x], [index])
        out = t.fresh("index.Tensor", shape, x.dtype)
        backward = _scatter("index_put.default")
        return t.emit("index.Tensor", [x, index], [out], saves=[index], backward=backward, **_subclasses(t))[0]


def _subclasses(t: Trace) -> dict[str, bool]:
    return {"subclasses": t.regime.tensor_subclasses}


def _scatter(kernel: str) -> BackwardRule:
    """Zeros like the input, into which the gradient is scattered; tensor subclasses get a copy of them.

    Source: torch/csrc/autograd/FunctionsManual.cpp `value_selecting_reduction_backward`, `gather_backward`,
    `index_backward`.
    """

    def backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
        source = op.inputs[0]
        result = engine.fresh("new_zeros.default", source.shape, source.dtype)
        if op.attributes["subclasses"]:
            result = engine.fresh(kernel, source.shape, source.dtype)
        return [result, *[None] * (len(op.inputs) - 1)]

    return backward
