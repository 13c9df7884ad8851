"""Liger-Kernel's fused norm, rotary positions and activations (Hsu et al., arXiv:2410.10989), as its Python allocates.

A Triton kernel allocates nothing: all memory is in the autograd functions around it (src/liger_kernel/ops). Some of
them write gradients over tensors that exist: the norm over its output's gradient, rotary positions over the query and
the key and their gradients, SwiGLU and GeGLU over the two factors they saved.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.autograd import Autograd
from simulator.graph import BackwardRule, Op, Shape, Tensor, flat
from simulator.ops.shape import clone, contiguous, transpose
from simulator.trace import Trace

Gradients = list[Tensor | None]


def liger_rms_norm(t: Trace, x: Tensor, weight: Tensor, *, in_place: bool) -> Tensor:
    """`LigerRMSNormFunction` (ops/rms_norm.py): saves its input and one fp32 statistic per row.

    Args:
        in_place: whether the input's gradient overwrites the output's.
    """
    t.dim("multiprocessors", t.regime.liger.multiprocessors)
    x = contiguous(t, x)
    out = t.fresh("liger_rms_norm", x.shape, x.dtype)
    statistics = t.fresh("liger_rms_norm.rstd", x.shape[:-1], FP32)
    _function(t, "liger_rms_norm", [x, weight], [out, statistics], [x, weight, statistics], _rms_norm_backward)
    t.graph.ops[-1].attributes["in_place"] = in_place
    return out


def _rms_norm_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The weight's gradient is summed over one program on each multiprocessor."""
    x, weight = op.inputs
    gradient = _contiguous(engine, gradients[0], x.shape)
    engine.fresh("empty.memory_format", (("multiprocessors",), weight.shape[0]), FP32)
    for_x = gradient if op.attributes["in_place"] else engine.fresh("zeros_like.default", x.shape, gradient.dtype)
    for_weight = engine.fresh("sum.dim_IntList", weight.shape, FP32)
    if weight.dtype != FP32:
        for_weight = engine.fresh("_to_copy.default", weight.shape, weight.dtype)
    return [engine.view(for_x, x.shape), for_weight]


def liger_rotary(t: Trace, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """`LigerRopeFunction` (ops/rope.py): turns ``[b, a, s, d]`` in place where it lies token by token in memory."""
    outputs = []
    for x in (query, key):
        by_token = tuple(t.squeezed((_token_major(x.shape),))[0])
        outputs.append(t.view(x if x.dense and x.memory == by_token else _by_token(t, x), x.shape, by_token))
    return _function(t, "liger_rope", [query, key, cos, sin], outputs, [cos, sin], _rotary_backward)


def _by_token(t: Trace, x: Tensor) -> Tensor:
    return transpose(t, clone(t, transpose(t, x, 1, 2)), 1, 2)


def _token_major(shape: Shape) -> tuple[str | int, ...]:
    batch, heads, tokens, channels = shape
    return flat((batch, tokens, heads, channels))


def _rotary_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Turns the gradients back in place, after a copy of those that lie in memory head by head."""
    results: Gradients = []
    for gradient, x in zip(gradients, op.inputs[:2], strict=True):
        assert gradient is not None
        order = _token_major(x.shape)
        if not gradient.dense or gradient.memory != order:
            gradient = engine.fresh("clone.default", x.shape, gradient.dtype, order)
        results.append(engine.view(gradient, x.shape, order))
    return [*results, None, None]


def liger_gate(t: Trace, name: str, gate: Tensor, up: Tensor) -> Tensor:
    """``activation(gate) * up``; saves both factors and nothing between.

    Args:
        name: ``liger_swiglu`` (ops/swiglu.py `LigerSiLUMulFunction`) or ``liger_geglu`` (ops/geglu.py
            `LigerGELUMulFunction`).
    """
    gate, up = contiguous(t, gate), contiguous(t, up)
    out = t.fresh(name, gate.shape, gate.dtype)
    _function(t, name, [gate, up], [out], [gate, up], _gate_backward)
    return out


def _gate_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Both gradients overwrite the factors."""
    _contiguous(engine, gradients[0], op.inputs[0].shape)
    return [engine.view(engine.overwritten(f"{op.name}_backward", x), x.shape) for x in op.inputs]


def liger_relu_squared(t: Trace, x: Tensor) -> Tensor:
    """`LigerReLUSquaredFunction` (ops/relu_squared.py): saves its input, and nothing is written over it."""
    x = contiguous(t, x)
    out = t.fresh("liger_relu_squared", x.shape, x.dtype)
    _function(t, "liger_relu_squared", [x], [out], [x], _relu_squared_backward)
    return out


def _relu_squared_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (x,) = op.inputs
    gradient = _contiguous(engine, gradients[0], x.shape)
    return [engine.view(engine.like("empty_like.default", gradient), x.shape)]


def _function(
    t: Trace, name: str, inputs: list[Tensor], outputs: list[Tensor], saves: list[Tensor], backward: BackwardRule
) -> tuple[Tensor, ...]:
    """A `torch.autograd.Function`: ``save_for_backward`` packs when its forward has returned."""
    made = t.emit(name, inputs, outputs, saves=saves, backward=backward)
    t.graph.ops[-1].saves_late = True
    return made


def _contiguous(engine: Autograd, gradient: Tensor | None, shape: Shape) -> Tensor:
    """`ensure_contiguous` (ops/utils.py) on a gradient."""
    assert gradient is not None
    return gradient if gradient.contiguous else engine.fresh("clone.default", shape, gradient.dtype)
