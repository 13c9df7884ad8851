"""Float8 linear layers with dynamic scales (torchao 0.18, float8/float8_linear.py), run eagerly.

Forward saves its input and weight in high precision and casts both; backward casts them and the gradient once more.
Each cast makes several copies in fp32 on its way, which are what eager float8 costs at its peak; compiled, they fuse.
"""

from __future__ import annotations

from typing import Protocol

from hardware.dtypes import BF16, FP8_E4M3, FP8_E5M2, FP32, FP64, DType
from hardware.errors import UnsupportedError
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor, flat
from simulator.ops.elementwise import add, to
from simulator.ops.shape import transpose, viewable
from simulator.sizes import Dim, product
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]
#: Both sides of a weight, and the tokens, must be multiples of this many elements (aten/src/ATen/native/cuda/Blas.cpp
#: `_scaled_mm_out_cuda`: "trailing dimension divisible by 16").
ALIGNMENT = 16
TENSORWISE, ROWWISE = "tensorwise", "rowwise"


class Kernels(Protocol):
    """Where kernels run: in forward, or in a node of backward."""

    def fresh(self, name: str, shape: Shape, dtype: DType, memory: Axis | None = None) -> Tensor:
        """Run kernel `name`, which allocates one tensor."""
        ...

    def free(self, *tensors: Tensor) -> None:
        """Python lets go of temporaries, after the kernel that ran last."""
        ...


class _Forward:
    """Kernels of a function outside autograd, in the forward pass."""

    def __init__(self, t: Trace, x: Tensor) -> None:
        self._trace, self._source = t, x

    def fresh(self, name: str, shape: Shape, dtype: DType, memory: Axis | None = None) -> Tensor:
        out = self._trace.fresh(name, shape, dtype, memory)
        return self._trace.emit(name, [self._source], [out])[0]

    def free(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self._trace.drop(tensor)


def convertible(t: Trace, x: Axis, out: Axis) -> bool:
    """Whether a linear layer from axis `x` to `out` is one of those that are converted."""
    if t.regime.float8 is None or any(product(axis, t.dimensions.bindings) % ALIGNMENT for axis in (x, out)):
        return False
    if t.regime.tensor_parallel or t.regime.memory_efficient_linear:
        raise UnsupportedError("'float8' on weights sharded along 'tp' or by ZeRO-3 is not modelled: leave it out")
    return True


def float8_linear(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None, out: Axis) -> Tensor:
    """`Float8Linear.forward` on ``[batch, sequence, in]`` with ``weight[out, in]``; a bias is added on its own."""
    with t.call("", x) as local:
        x = local("input", to(t, x, t.regime.autocast or x.dtype))
        result = local("output", _product(t, x, transpose(t, weight, 0, 1), out))
        return result if bias is None else local("output", add(t, result, to(t, bias, result.dtype)))


def _product(t: Trace, x: Tensor, weight: Tensor, out: Axis) -> Tensor:
    """`matmul_with_hp_or_float8_args.forward`: `x` with ``weight[in, out]``."""
    kernels, recipe = _Forward(t, x), str(t.regime.float8)
    low = [
        _cast(kernels, x, x.shape[:-1], FP8_E4M3, recipe),
        _cast(kernels, weight, weight.shape[1:], FP8_E4M3, recipe),
    ]
    inverse = [kernels.fresh("reciprocal.default", scale.shape, FP32) for _, scale in low]
    shape = (*x.shape[:-1], out)
    result = t.fresh("_scaled_mm.default", shape, x.dtype)
    if _rounded(recipe, x.dtype):
        rounded = kernels.fresh("_scaled_mm.default", shape, BF16)
        result = t.fresh("_to_copy.default", shape, x.dtype)
    t.emit("_scaled_mm.default", [x, weight], [result], saves=[x, weight], backward=_backward, recipe=recipe)
    t.graph.ops[-1].saves_late = True  # save_for_backward packs when the function has returned
    kernels.free(*([rounded] if _rounded(recipe, x.dtype) else []), *inverse, *(each for pair in low for each in pair))
    return result


def _rounded(recipe: str, dtype: DType) -> bool:
    """Whether the product is made in bf16 first: the kernel for scales of rows has no other output."""
    return recipe == ROWWISE and dtype != BF16


def _cast(kernels: Kernels, x: Tensor, scales: Shape, dtype: DType, recipe: str) -> tuple[Tensor, Tensor]:
    """`hp_tensor_to_float8_dynamic`: the low-precision copy of `x`, laid out like it, and its scales.

    Args:
        scales: the axes along which scales differ, where each row or column has one.
    """
    scale = _scale(kernels, x, scales if recipe == ROWWISE else (), recipe)
    wide = kernels.fresh("_to_copy.default", x.shape, FP32, x.memory) if x.dtype != FP32 else None
    scaled = kernels.fresh("mul.Tensor", x.shape, FP32, x.memory)
    kernels.free(*([wide] if wide else []))
    clamped = kernels.fresh("clamp.default", x.shape, FP32, x.memory)
    low = kernels.fresh("_to_copy.default", x.shape, dtype, x.memory)
    kernels.free(clamped, scaled)
    return low, scale


def _scale(kernels: Kernels, x: Tensor, shape: Shape, recipe: str) -> Tensor:
    """`tensor_to_scale` (float8/float8_utils.py): the largest value in fp64, inverted; of rows a power of two."""
    absolute = kernels.fresh("abs.default", x.shape, x.dtype, x.memory)
    largest = kernels.fresh("amax.default" if recipe == ROWWISE else "max.default", shape, x.dtype)
    kernels.free(absolute)
    wide, clamped, inverse, scale = (
        kernels.fresh(name, shape, FP64)
        for name in ("_to_copy.default", "clamp.default", "reciprocal.default", "mul.Tensor")
    )
    kernels.free(clamped, inverse)
    rounded = kernels.fresh("_to_copy.default", shape, FP32)
    kernels.free(scale)
    if recipe == ROWWISE:
        logarithm = kernels.fresh("log2.default", shape, FP32)
        floor = kernels.fresh("floor.default", shape, FP32)
        kernels.free(logarithm)
        power = kernels.fresh("exp2.default", shape, FP32)
        kernels.free(floor, rounded)
        rounded = power
    kernels.free(wide, largest)
    return rounded


def _backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """`matmul_with_hp_or_float8_args.backward`: four casts, whose copies live until it returns, and two products."""
    (gradient,) = gradients
    assert gradient is not None
    x, weight = op.inputs
    recipe = op.attributes["recipe"]
    rows, inner, outer = flat(x.shape[:-1]), x.shape[-1], weight.shape[1]
    gradient = _flattened(engine, gradient, (rows, outer))
    tokens = engine.view(x, (rows, inner))
    low = FP8_E4M3 if recipe == ROWWISE else FP8_E5M2
    by_token = _cast(engine, gradient, (rows,), low, recipe)
    by_input = _cast(engine, weight, (inner,), FP8_E4M3, recipe)
    weight_copy = engine.fresh("contiguous.default", (outer, inner), FP8_E4M3)
    for_x = _scaled(engine, by_token[1], by_input[1], (rows, inner), gradient.dtype, recipe)
    engine.free(weight_copy)
    by_output = _cast(engine, gradient, (outer,), low, recipe)
    by_channel = _cast(engine, tokens, (inner,), FP8_E4M3, recipe)
    copies = [
        engine.fresh("contiguous.default", shape, dtype)
        for shape, dtype in (((outer, rows), low), ((rows, inner), FP8_E4M3))
    ]
    for_weight = _scaled(engine, by_output[1], by_channel[1], (outer, inner), gradient.dtype, recipe)
    engine.free(*copies)
    return [engine.view(for_x, x.shape), engine.view(for_weight, weight.shape, weight.memory)]


def _flattened(engine: Autograd, gradient: Tensor, shape: Shape) -> Tensor:
    if viewable(gradient, shape):
        return engine.view(gradient, shape)
    return engine.fresh("clone.default", shape, gradient.dtype)


def _scaled(engine: Autograd, first: Tensor, second: Tensor, shape: Shape, dtype: DType, recipe: str) -> Tensor:
    """`addmm_float8_unwrapped` without fast accumulation: scales of rows are applied to the product afterwards."""
    inverse = [engine.fresh("reciprocal.default", scale.shape, FP32) for scale in (first, second)]
    if recipe == ROWWISE:
        whole = engine.fresh("mul.Tensor", shape, FP32)
        for index in (0, 1):
            one = engine.fresh("new_ones.default", (), FP32)
            engine.free(inverse[index])
            inverse[index] = one
        inverse.append(whole)
    result = engine.fresh("_scaled_mm.default", shape, BF16 if _rounded(recipe, dtype) else dtype)
    if _rounded(recipe, dtype):
        rounded, result = result, engine.fresh("_to_copy.default", shape, dtype)
        engine.free(rounded)
    engine.free(*inverse)
    return result
