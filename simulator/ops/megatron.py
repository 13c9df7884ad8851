"""Megatron-LM's own autograd functions and fused kernels, on sequence-first tensors ``[s, b, h]``.

Sources, megatron-core 0.16: megatron/core/tensor_parallel/layers.py
(`LinearWithGradAccumulationAndAsyncCommunication`), mappings.py, cross_entropy.py, megatron/core/fusions/. Ranks lie
next to each other along the first axis, so no collective needs a copy; all-reduces are in place and allocate nothing.
A fused kernel (`jit_fuser`) is one op that allocates its outputs alone.
"""

from __future__ import annotations

from hardware.dtypes import BOOL, FP32, INT64
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor, flat
from simulator.ops.elementwise import constant
from simulator.ops.embedding import embedding, vocabulary_mask
from simulator.sizes import Dim
from simulator.tensor_parallel import AXIS
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]


def fused_linear(
    t: Trace,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Axis,
    rows: Axis | None = None,
    *,
    gathers: bool = False,
) -> Tensor:
    """A linear layer that saves `x` as it is handed in: a shard of the sequence, gathered anew for each product.

    Args:
        rows: the whole sequence where `x` is a shard of it; what is gathered lies in one buffer for all layers.
        gathers: whether it lies in a tensor of its own instead, as in Transformer Engine
            (transformer_engine/pytorch/module/linear.py).
    """
    whole = (rows or x.shape[0], *x.shape[1:-1])
    gathers = gathers and rows is not None
    attributes = {"whole": whole, "shard": rows is not None, "gathers": gathers}
    with t.call("") as local:
        if gathers:
            local("total", constant(t, "all_gather", x, shape=(*whole, x.shape[-1])))
        if bias is None:
            result = t.fresh("mm.default", (*whole, out), x.dtype)
            t.emit("mm.default", [x, weight], [result], saves=[x, weight], backward=_linear_backward, **attributes)
            return result
        product = local("output", constant(t, "mm.default", x, shape=(*whole, out)))
        result = t.fresh("add.Tensor", (*whole, out), x.dtype)
        inputs = [x, weight, bias, product]
        t.emit("add.Tensor", inputs, [result], saves=[x, weight], backward=_linear_backward, **attributes)
    return result


def _linear_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The input's gradient, its reduce-scatter, the weight's and the bias' gradients, in this order."""
    x, weight, *rest = op.inputs
    if op.attributes["gathers"]:
        engine.fresh("all_gather", (*op.attributes["whole"], x.shape[-1]), x.dtype)
    for_x = engine.fresh("mm.default", (*op.attributes["whole"], x.shape[-1]), x.dtype)
    if op.attributes["shard"]:
        for_x = engine.fresh("reduce_scatter", x.shape, x.dtype)
    for_weight = engine.fresh("mm.default", weight.shape, weight.dtype)
    for_bias = [engine.fresh("sum.dim_IntList", rest[0].shape, rest[0].dtype), None] if rest else []
    return [for_x, for_weight, *for_bias]


def scatter_partial(t: Trace, x: Tensor, shard: Axis) -> Tensor:
    """`reduce_scatter_to_sequence_parallel_region`: the gradient is gathered."""
    out = t.fresh("reduce_scatter", (shard, *x.shape[1:]), x.dtype)
    t.emit("reduce_scatter", [x], [out], backward=_gather_backward)
    return out


def scatter_replicated(t: Trace, x: Tensor, shard: Axis) -> Tensor:
    """`scatter_to_sequence_parallel_region`: a view of this rank's part; the gradient is gathered."""
    out = t.view(x, (shard, *x.shape[1:]), flat((shard, *x.shape[1:])))
    t.emit("split", [x], [out], backward=_gather_backward)
    return out


def _gather_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x = op.inputs[0]
    return [engine.fresh("all_gather", x.shape, x.dtype)]


def gather_features(t: Trace, x: Tensor, whole: Axis) -> Tensor:
    """`all_gather_last_dim_from_tensor_parallel_region`: ranks are joined in a copy; the gradient is reduced back."""
    shape = (*x.shape[:-1], whole)
    out, gathered = t.fresh("cat.default", shape, x.dtype), t.fresh("all_gather", shape, x.dtype)
    t.emit("all_gather", [x], [out, gathered], backward=_reduce_features_backward)
    return out


def _reduce_features_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    x, whole = op.inputs[0], op.outputs[0]
    engine.fresh("cat.default", whole.shape, x.dtype)
    return [engine.fresh("reduce_scatter", x.shape, x.dtype)]


def part(t: Trace, x: Tensor, shape: Shape) -> Tensor:
    """A slice of `x`: its gradient is padded back to the whole of `x`."""
    out = t.view(x, shape, flat(shape))
    out.dense = False
    t.emit("slice.Tensor", [x], [out], backward=_part_backward)
    return out


def _part_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.fresh("slice_backward.default", op.inputs[0].shape, op.inputs[0].dtype)]


def vocabulary_rows(t: Trace, weight: Tensor, indices: Tensor) -> Tensor:
    """`VocabParallelEmbedding` before its reduction: saves masked ids and mask, and masks the gradient in a copy."""
    with t.call("") as local:
        masked = local("masked_input", vocabulary_mask(t, indices, local))
        mask = local("input_mask", local.held("mask"))
        rows = embedding(t, weight, masked)
        out = t.view(rows, rows.shape)
        t.emit("index_put_", [rows, mask], [out], saves=[mask], backward=_index_put_backward)
    return out


def _index_put_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    (gradient,) = gradients
    assert gradient is not None
    return [engine.like("index_put.default", gradient), None]


def bias_gelu(t: Trace, x: Tensor, bias: Tensor) -> Tensor:
    """`bias_gelu_impl`: saves input and bias."""
    out = t.fresh("bias_gelu", x.shape, x.dtype)
    t.emit("bias_gelu", [x, bias], [out], saves=[x, bias], backward=_bias_gelu_backward)
    return out


def _bias_gelu_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    gradient = engine.like("bias_gelu_back", op.inputs[0])
    return [gradient, gradient]


def swiglu(t: Trace, x: Tensor, half: Axis) -> Tensor:
    """`bias_swiglu_impl` without a bias: gate and up side by side in one tensor, which is saved."""
    out = t.fresh("swiglu", (*x.shape[:-1], half), x.dtype)
    t.emit("swiglu", [x], [out], saves=[x], backward=_swiglu_backward)
    return out


def _swiglu_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.like("swiglu_back", op.inputs[0])]


def bias_dropout_add(t: Trace, x: Tensor, bias: Tensor | None, residual: Tensor, rate: float) -> Tensor:
    """`bias_dropout_add_fused_train`: keeps the dropout mask, one byte per element."""
    out = t.fresh("bias_dropout_add", residual.shape, residual.dtype)
    masks = [t.fresh("bias_dropout_add.mask", x.shape, BOOL)] if rate else []
    inputs = [x, residual] if bias is None else [x, residual, bias]
    t.emit("bias_dropout_add", inputs, [out, *masks], saves=masks, backward=_bias_dropout_add_backward)
    return out


def _bias_dropout_add_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    gradient = gradients[0]
    assert gradient is not None
    for_x = engine.like("dropout_backward", gradient) if len(op.outputs) > 1 else gradient
    return [for_x, gradient, *([for_x] if len(op.inputs) > 2 else [])]


def vocabulary_cross_entropy(t: Trace, logits: Tensor, targets: Tensor) -> Tensor:
    """`_VocabParallelCrossEntropy`: exponentials are taken in place of the fp32 logits, and saved as the softmax.

    Returns:
        One fp32 loss per token.
    """
    rows = logits.shape[:-1]
    flat_rows = (flat(rows),)
    with t.call("") as local:
        scores = (
            local("scores", constant(t, "_to_copy.default", logits, dtype=FP32)) if logits.dtype != FP32 else logits
        )
        with t.call("") as inner:
            inner("indices", constant(t, "max.dim_indices", scores, dtype=INT64, shape=rows))
            local("logits_max", constant(t, "max.dim", scores, shape=rows))
        masked = local("masked_target", vocabulary_mask(t, targets, local))
        mask = local.held("mask")
        with t.call("") as inner:
            inner("arange", constant(t, "arange.default", targets, shape=flat_rows))
            with t.call("") as index:
                index("index", constant(t, "index.Tensor", scores, shape=flat_rows))
                local("predicted", constant(t, "clone.default", scores, shape=flat_rows))
            local("sum_exp", constant(t, "sum.dim_IntList", scores, shape=rows))
        with t.call("") as inner:
            inner("log", constant(t, "log.default", scores, shape=rows))
            loss = t.fresh("sub.Tensor", rows, FP32)
            kept = [scores, mask, masked]
            inputs = [logits, *kept]
            t.emit("sub.Tensor", inputs, [loss], saves=kept, backward=_cross_entropy_backward, in_python=True)
    return loss


def _cross_entropy_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The softmax becomes the gradient in place."""
    logits, softmax, mask, masked = op.inputs
    rows = (flat(mask.shape),)
    engine.fresh("arange.default", rows, masked.dtype)
    copy = engine.fresh("_to_copy.default", rows, FP32)
    engine.fresh("rsub.Scalar", rows, FP32)
    engine.free(copy)
    engine.free(engine.fresh("index.Tensor", rows, FP32))
    return [engine.view(softmax, logits.shape), None, None, None]


def fused_cross_entropy(t: Trace, logits: Tensor, targets: Tensor) -> Tensor:
    """Transformer Engine's `parallel_cross_entropy`: the gradient takes the place of the logits in forward already.

    As in Transformer Engine 2.11 (transformer_engine/pytorch/triton/cross_entropy.py `cross_entropy_forward`).

    Returns:
        One fp32 loss per token.
    """
    rows = logits.shape[:-1]
    with t.call("") as local:
        loss = t.fresh("cross_entropy_kernel", rows, FP32)
        sums = local("m_d_X_y", constant(t, "zeros.default", logits, dtype=FP32, shape=((3, *flat(rows)),)))
        if t.regime.tensor_parallel is not None:
            local("gathered", constant(t, "zeros.default", sums, shape=((AXIS, *flat(sums.shape)),)))
        t.emit(
            "cross_entropy_kernel", [logits, targets], [loss], saves=[logits], backward=_fused_cross_entropy_backward
        )
    return loss


def _fused_cross_entropy_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.view(op.inputs[0], op.inputs[0].shape), None]


def fused_rope(t: Trace, x: Tensor, freqs: Tensor) -> Tensor:
    """Transformer Engine's `FusedRoPEFunc`: one kernel that saves the angles alone (pytorch/attention/rope.py)."""
    out = t.fresh("fused_rope", x.shape, x.dtype)
    t.emit("fused_rope", [x, freqs], [out], saves=[freqs], backward=_fused_rope_backward)
    return out


def _fused_rope_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.fresh("fused_rope_backward", op.inputs[0].shape, op.inputs[0].dtype), None]
