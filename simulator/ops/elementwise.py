"""Elementwise ops, with and without broadcasting."""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import FP32, DType
from simulator.autograd import Autograd
from simulator.graph import BackwardRule, Op, Shape, Tensor, flat
from simulator.roles import Role
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]


def unary(
    t: Trace, name: str, x: Tensor, kernels: Sequence[str], *, saves: str = "", dtype: DType | None = None
) -> Tensor:
    """An op of one tensor whose backward runs `kernels`, each allocating one tensor like its input.

    Args:
        saves: ``input``, ``output`` or nothing.
        dtype: the output's element type; the input's by default.
    """
    out = t.fresh(name, x.shape, dtype or x.dtype, x.memory)
    saved = {"input": [x], "output": [out], "": []}[saves]
    t.emit(name, [x], [out], saves=saved, backward=_chain(tuple(kernels)))
    return out


_CHAINS: dict[tuple[str, ...], BackwardRule] = {}


def _chain(kernels: tuple[str, ...]) -> BackwardRule:
    """The rule that runs `kernels` one after the other; no kernel passes the gradient through."""

    def backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
        (gradient,) = gradients
        assert gradient is not None
        for kernel in kernels:
            gradient = engine.fresh(kernel, op.inputs[0].shape, op.inputs[0].dtype, gradient.memory)
        return [gradient]

    return _CHAINS.setdefault(kernels, backward)


def power(t: Trace, x: Tensor) -> Tensor:
    """``x.pow(n)`` for a scalar n other than 0 and 1; autocast runs it in fp32."""
    x = to(t, x, FP32) if t.regime.autocast else x
    return unary(t, "pow.Tensor_Scalar", x, ("pow.Tensor_Scalar", "mul.Scalar", "mul.Tensor"), saves="input")


def rsqrt(t: Trace, x: Tensor) -> Tensor:
    """``torch.rsqrt``: backward multiplies by -0.5 out^3."""
    return unary(t, "rsqrt.default", x, ("pow.Tensor_Scalar", "mul.Scalar", "mul.Tensor"), saves="output")


def tanh(t: Trace, x: Tensor) -> Tensor:
    """``torch.tanh``."""
    return unary(t, "tanh.default", x, ("tanh_backward.default",), saves="output")


def sigmoid(t: Trace, x: Tensor) -> Tensor:
    """``torch.sigmoid``."""
    return unary(t, "sigmoid.default", x, ("sigmoid_backward.default",), saves="output")


def gelu(t: Trace, x: Tensor) -> Tensor:
    """``torch.nn.functional.gelu``, exact or tanh approximation: one fused kernel either way."""
    return unary(t, "gelu.default", x, ("gelu_backward.default",), saves="input")


def relu(t: Trace, x: Tensor) -> Tensor:
    """``torch.nn.functional.relu``: its output says where it was active."""
    return unary(t, "relu.default", x, ("threshold_backward.default",), saves="output")


#: torch aten/src/ATen/native/Activation.cpp `math_silu_backward`: what runs where the device has no fused kernel.
_COMPOSITE_SILU_BACKWARD = (
    "sigmoid.default",
    "empty_like.default",
    "mul.Tensor",
    "add.Scalar",
    "mul.Tensor",
    "mul.Tensor",
)


def exp(t: Trace, x: Tensor) -> Tensor:
    """``torch.exp``, in fp32 under autocast: its output is the factor of its gradient."""
    return unary(t, "exp.default", wide(t, x), ("mul.Tensor",), saves="output")


def softplus(t: Trace, x: Tensor) -> Tensor:
    """``torch.nn.functional.softplus``, in fp32 under autocast."""
    return unary(t, "softplus.default", wide(t, x), ("softplus_backward.default",), saves="input")


def wide(t: Trace, x: Tensor) -> Tensor:
    """`x` as autocast hands it to an op of its fp32 list."""
    return to(t, x, FP32) if t.regime.autocast else x


def silu(t: Trace, x: Tensor) -> Tensor:
    """``torch.nn.functional.silu``."""
    fused = t.regime.fused_activation_backward
    kernels = ("silu_backward.default",) if fused else _COMPOSITE_SILU_BACKWARD
    return unary(t, "silu.default", x, kernels, saves="input")


def neg(t: Trace, x: Tensor) -> Tensor:
    """``-x``."""
    return unary(t, "neg.default", x, ("neg.default",))


def mul_scalar(t: Trace, x: Tensor, name: str = "mul.Tensor") -> Tensor:
    """``x * number``."""
    return unary(t, name, x, (name,))


def div_scalar(t: Trace, x: Tensor) -> Tensor:
    """``x / number``."""
    return unary(t, "div.Tensor", x, ("div.Tensor",))


def div_constant(t: Trace, x: Tensor, divisor: Tensor) -> Tensor:
    """``x / divisor`` by a tensor without a gradient, which is saved."""
    out = t.fresh("div.Tensor", x.shape, x.dtype, x.memory)
    t.emit("div.Tensor", [x, divisor], [out], saves=[divisor], backward=_div_constant_backward)
    return out


def _div_constant_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.like("div.Tensor", op.inputs[0]), None]


def add_scalar(t: Trace, x: Tensor) -> Tensor:
    """``x + number``: the gradient passes through untouched."""
    return unary(t, "add.Tensor", x, ())


def constant(t: Trace, name: str, x: Tensor, *, dtype: DType | None = None, shape: Shape | None = None) -> Tensor:
    """An op outside autograd (masks, positions, rotary tables): reads `x`, makes one tensor."""
    out = t.fresh(name, x.shape if shape is None else shape, dtype or x.dtype)
    t.emit(name, [x], [out])
    return out


def to(t: Trace, x: Tensor, dtype: DType, *, contiguous: bool = False) -> Tensor:
    """``x.to(dtype)``: nothing at all when `x` has that dtype already; a copy keeps the layout of a dense tensor only.

    Source: torch aten/src/ATen/native/TensorConversions.cpp `_to_copy`.

    Args:
        contiguous: whether a copy is contiguous anyhow (``memory_format=torch.contiguous_format``).
    """
    if x.dtype == dtype:
        return x
    kept = x.memory if x.dense else suggested_memory(x, x.shape)
    out = t.fresh("_to_copy.default", x.shape, dtype, flat(x.shape) if contiguous else kept)
    if x.storage.role is Role.PARAMETER:
        out.storage.role = Role.WEIGHT_CAST
    t.emit("_to_copy.default", [x], [out], backward=_to_backward)
    return out


def suggested_memory(x: Tensor, shape: Shape) -> tuple[Dim, ...]:
    """The layout that torch suggests for a tensor of `shape` like `x`: contiguous, or channels last.

    The latter for four axes of which the second varies fastest (torch c10/core/MemoryFormat.h
    `is_channels_last_strides_2d`).
    """
    if len(x.shape) == 4 and x.memory == _channels_last(x.shape) != x.dims:
        return _channels_last(shape)
    return flat(shape)


def _channels_last(shape: Shape) -> tuple[Dim, ...]:
    return flat((shape[0], *shape[2:], shape[1]))


def _to_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    return [engine.like("_to_copy.default", gradient, op.inputs[0].dtype)]


def autocast(t: Trace, x: Tensor) -> Tensor:
    """The copy of `x` that autocast hands to an op of its low-precision list.

    A weight is cast once and its copy kept until autocast ends
    (torch aten/src/ATen/autocast_mode.cpp `cached_cast`); an activation is cast at every use.
    """
    low = t.regime.autocast
    if low is None or x.dtype != FP32:
        return x
    if not x.is_parameter:
        return to(t, x, low)
    cast = t.cached_cast(x)
    if cast is None:
        cast = to(t, x, low)
        cast.storage.cached_by_autocast = True
        t.remember_cast(x, cast)
    return cast


def promote(x: Tensor, y: Tensor) -> DType:
    """The dtype of an op on both: the wider one; a tensor without dimensions does not count."""
    if not x.dims or not y.dims:
        return x.dtype if x.dims else y.dtype
    return x.dtype if x.dtype.bits >= y.dtype.bits else y.dtype


def _broadcast(t: Trace, name: str, x: Tensor, y: Tensor, shape: Shape | None = None) -> Tensor:
    if shape is not None:
        return t.fresh(name, shape, promote(x, y))
    large = max(x, y, key=lambda tensor: (len(tensor.dims), len(tensor.shape)))
    return t.fresh(name, large.shape, promote(x, y), large.memory)


def add(t: Trace, x: Tensor, y: Tensor, name: str = "add.Tensor") -> Tensor:
    """``x + y``: saves nothing, hands its gradient to both."""
    out = _broadcast(t, name, x, y)
    t.emit(name, [x, y], [out], backward=_add_backward)
    return out


def add_into(t: Trace, x: Tensor, y: Tensor) -> Tensor:
    """``x += y``: allocates nothing."""
    return t.emit("add_.Tensor", [x, y], [t.view(x, x.shape)], backward=_add_backward)[0]


def add_into_view(t: Trace, x: Tensor, y: Tensor) -> Tensor:
    """``x += y`` where `x` is a view of another tensor: autograd rewrites that tensor's history (`CopySlices`)."""
    return t.emit("add_.Tensor", [x, y], [t.view(x, x.shape)], backward=_add_into_view_backward)[0]


def _add_into_view_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """A new gradient for the base, and a copy of the part's (torch/csrc/autograd/functions/tensor.cpp `CopySlices`)."""
    (gradient,) = gradients
    assert gradient is not None
    base = engine.like("new_empty_strided.default", gradient)
    return [base, engine.like("clone.default", gradient)]


def div_into(t: Trace, x: Tensor) -> Tensor:
    """``x /= number``: allocates nothing in forward."""
    return t.emit("div_.Tensor", [x], [t.view(x, x.shape)], backward=_chain(("div.Tensor",)))[0]


def sub(t: Trace, x: Tensor, y: Tensor, *, shape: Shape | None = None) -> Tensor:
    """``x - y``: saves nothing; the gradient of `y` is negated.

    Args:
        shape: of the result, where both broadcast.
    """
    out = _broadcast(t, "sub.Tensor", x, y, shape)
    t.emit("sub.Tensor", [x, y], [out], backward=_sub_backward)
    return out


def _sub_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    x, y = op.inputs
    return [gradient if x.requires_grad else None, engine.like("neg.default", gradient) if y.requires_grad else None]


def _add_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    return [gradient if x.requires_grad else None for x in op.inputs]


def mul(t: Trace, x: Tensor, y: Tensor) -> Tensor:
    """``x * y``: saves each factor that the other's gradient needs."""
    out = _broadcast(t, "mul.Tensor", x, y)
    saves = [a for a, b in ((x, y), (y, x)) if b.requires_grad]
    t.emit("mul.Tensor", [x, y], [out], saves=saves, backward=_mul_backward)
    return out


def _mul_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The second factor's gradient comes first (generated `MulBackward0`)."""
    (gradient,) = gradients
    assert gradient is not None
    x, y = op.inputs
    for_y = engine.like("mul.Tensor", gradient, promote(gradient, x)) if y.requires_grad else None
    for_x = engine.like("mul.Tensor", gradient, promote(gradient, y)) if x.requires_grad else None
    return [for_x, for_y]


def recomputed_gelu(t: Trace, x: Tensor) -> Tensor:
    """`GeLUFunction` (transformers models/bloom/modeling_bloom.py): spelled out in Python, saves its input only."""
    with t.call("") as local:
        half = local("half", constant(t, "mul.Tensor", x))
        with t.call("") as inner:
            inner("scaled", constant(t, "mul.Tensor", x))
            for name in ("mul.Tensor", "mul.Tensor", "add.Tensor"):
                inner("cube", constant(t, name, x))
            local("one", constant(t, "mul.Tensor", x))
        for name in ("tanh.default", "add.Tensor"):
            local("one", constant(t, name, x))
        out = t.fresh("mul.Tensor", x.shape, x.dtype, x.memory)
        t.emit("mul.Tensor", [x, half], [out], saves=[x], backward=_recomputed_gelu_backward)
        t.graph.ops[-1].saves_late = True
        return out


def _recomputed_gelu_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x = op.inputs[0]

    def combine(name: str, *used: Tensor) -> Tensor:
        made = engine.like(name, x)
        engine.free(*used)
        return made

    def cubic() -> Tensor:
        return combine("add.Tensor", combine("mul.Tensor", combine("mul.Tensor")))

    scaled = combine("mul.Tensor")
    inner = combine("mul.Tensor", scaled, cubic())
    tanh_out = combine("tanh.default", inner)
    half = combine("mul.Tensor")
    slope = combine("rsub.Scalar", combine("mul.Tensor"))
    slope = combine("mul.Tensor", slope, cubic())
    slope = combine("mul.Tensor", half, slope)
    value = combine("mul.Tensor", combine("add.Tensor"))
    total = combine("add.Tensor", slope, value)
    result = engine.like("mul.Tensor", x)
    engine.free(total, tanh_out)
    return [result, None]
