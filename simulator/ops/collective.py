"""Collectives of tensor parallelism, with the copies that DTensor makes around them.

Sources: torch/distributed/tensor/_redistribute.py, placement_types.py and torch/distributed/_functional_collectives.py
(torch 2.13). A collective concatenates ranks along the first axis; another axis takes a copy before a reduce-scatter
and, unless all axes before it are 1, after an all-gather. Gradients that a collective returns are subclass tensors
(`AsyncCollectiveTensor`, `DTensor`), into which the engine never accumulates: they are handed on as views.
"""

from __future__ import annotations

from simulator.autograd import Autograd
from simulator.graph import BackwardRule, Op, Shape, Tensor
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]

GATHER, SCATTER, REDUCE = "all_gather_into_tensor.default", "reduce_scatter_tensor.default", "all_reduce.default"


def all_gather(t: Trace, x: Tensor, axis: int, whole: Axis) -> Tensor:
    """Shard(axis) -> Replicate for linear layers: the gradient comes back partial and is reduce-scattered."""
    return _gather(t, x, axis, whole, _scatter_gradient)


def gather_output(t: Trace, x: Tensor, axis: int, whole: Axis) -> Tensor:
    """Shard(axis) -> Replicate for what every rank does alike: the gradient comes back whole, each keeps its chunk.

    Uneven shards (`torch.chunk`) are padded to the first one's size; the padding is cut off with a copy.
    """
    padded = t.padded(whole)
    gathered = _gather(t, x, axis, padded, _chunk_gradient)
    if padded == whole:
        return gathered
    with t.call("", gathered):
        out = t.fresh("clone.default", _replaced(x.shape, axis, whole), x.dtype)
        t.emit("clone.default", [gathered], [out], backward=_passed_on)
        return out


def _gather(t: Trace, x: Tensor, axis: int, whole: Axis, backward: BackwardRule) -> Tensor:
    shape = t.squeezed(_replaced(x.shape, axis, whole))
    outputs = [t.fresh(GATHER, shape, x.dtype)]
    if not _stays_in_place(shape, axis):
        outputs.insert(0, t.fresh("cat.default", shape, x.dtype))
    t.emit("all_gather", [x], outputs, backward=backward, axis=axis)
    return outputs[0]


def reduce_scatter(t: Trace, x: Tensor, axis: int, shard: Axis) -> Tensor:
    """Partial -> Shard(axis): the gradient is gathered."""
    out = t.fresh(SCATTER, _replaced(x.shape, axis, shard), x.dtype)
    copies = [t.fresh("cat.default", x.shape, x.dtype)] if axis else []
    t.emit("reduce_scatter", [x], [out, *copies], backward=_gather_gradient, axis=axis)
    return out


def all_reduce(t: Trace, x: Tensor) -> Tensor:
    """Partial -> Replicate: the gradient is replicated already."""
    out = t.fresh(REDUCE, x.shape, x.dtype)
    t.emit(REDUCE, [x], [out], backward=_passed_on)
    return out


def replicated_input(t: Trace, x: Tensor) -> Tensor:
    """``DTensor.from_local(x, Replicate())``: nothing in forward; the gradient comes back partial and is reduced."""
    out = t.view(x, x.shape)
    t.emit("from_local", [x], [out], backward=_reduce_gradient)
    return out


def _replaced(shape: Shape, axis: int, dims: Axis) -> Shape:
    return (*shape[:axis], dims, *shape[axis + 1 :])


def _stays_in_place(shape: Shape, axis: int) -> bool:
    """Whether moving the ranks to `axis` crosses nothing (torch/_utils.py `_maybe_view_chunk_cat`)."""
    return not any(shape[:axis])


def _passed_on(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return gradients[:1]


def _reduce_gradient(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x = op.inputs[0]
    return [engine.view(engine.fresh(REDUCE, x.shape, x.dtype), x.shape)]


def _scatter_gradient(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x, whole = op.inputs[0], op.outputs[0]
    if op.attributes["axis"]:
        engine.fresh("cat.default", whole.shape, x.dtype)
    return [engine.view(engine.fresh(SCATTER, x.shape, x.dtype), x.shape)]


def _gather_gradient(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x = op.inputs[0]
    gathered = engine.fresh(GATHER, x.shape, x.dtype)
    if not _stays_in_place(x.shape, op.attributes["axis"]):
        gathered = engine.fresh("cat.default", x.shape, x.dtype)
    return [engine.view(gathered, x.shape)]


def _chunk_gradient(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x = op.inputs[0]
    return [engine.view(engine.fresh("clone.default", x.shape, x.dtype), x.shape)]
