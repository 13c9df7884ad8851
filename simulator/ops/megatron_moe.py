"""What Megatron-LM and Transformer Engine run around experts: routing, all-to-all, permutation, grouped products.

Sources: megatron-core 0.16 (megatron/core/transformer/moe/moe_utils.py, tensor_parallel/mappings.py,
fusions/fused_bias_swiglu.py, fused_mla_yarn_rope_apply.py) and Transformer Engine 2.11
(transformer_engine/pytorch/permutation.py, triton/permutation.py, module/grouped_linear.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import BOOL, FP32, INT32
from simulator.autograd import Autograd
from simulator.graph import Op, Shape, Tensor
from simulator.ops.elementwise import constant
from simulator.sizes import Dim
from simulator.trace import Trace

Gradients = list[Tensor | None]
Axis = tuple[Dim, ...]

#: Tokens that one program of `make_row_id_map` counts (triton/permutation.py, ``block_size``).
PERMUTATION_BLOCK = 1024


def router_linear(t: Trace, x: Tensor, weight: Tensor) -> Tensor:
    """`RouterGatingLinearFunction` of ``moe_router_dtype`` left out: saves both, computes in their element type."""
    out = t.fresh("router_mm", (*x.shape[:-1], weight.shape[0]), x.dtype)
    return t.emit("router_mm", [x, weight], [out], saves=[x, weight], backward=_router_backward)[0]


def _router_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.fresh("router_mm", each.shape, each.dtype) for each in op.inputs]


def scatter(t: Trace, like: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """``torch.zeros_like(like).scatter(1, indices, values)``: a second tensor; the indices are saved."""
    with t.call("") as local:
        zeros = local("zeros", constant(t, "zeros_like.default", like))
        out = t.fresh("scatter.src", like.shape, like.dtype)
        inputs, saves = [zeros, indices, values], [indices]
        return t.emit("scatter.src", inputs, [out], saves=saves, backward=_scatter_backward)[0]


def _scatter_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    values = op.inputs[2]
    return [None, None, engine.fresh("gather.default", values.shape, values.dtype)]


def chosen(t: Trace, like: Tensor, indices: Tensor) -> Tensor:
    """``torch.zeros_like(like).int().scatter(1, indices, 1).bool()``."""
    with t.call("") as local:
        local("zeros", constant(t, "zeros_like.default", like))
        local("zeros", constant(t, "_to_copy.default", like, dtype=INT32))
        local("zeros", constant(t, "scatter.value", indices, dtype=INT32, shape=like.shape))
        return constant(t, "_to_copy.default", like, dtype=BOOL)


def kept(t: Trace, like: Tensor, indices: Tensor) -> Tensor:
    """``torch.zeros_like(like).scatter(0, indices, 1).bool()``."""
    with t.call("") as local:
        local("zeros", constant(t, "zeros_like.default", like))
        local("zeros", constant(t, "scatter.value", indices, dtype=like.dtype, shape=like.shape))
        return constant(t, "_to_copy.default", like, dtype=BOOL)


def mask(t: Trace, x: Tensor, where: Tensor) -> Tensor:
    """``x * where`` for a bool tensor, which is saved."""
    out = t.fresh("mul.Tensor", x.shape, x.dtype)
    return t.emit("mul.Tensor", [x, where], [out], saves=[where], backward=_mask_backward)[0]


def _mask_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.fresh("mul.Tensor", op.inputs[0].shape, op.inputs[0].dtype), None]


def attach_loss(t: Trace, x: Tensor, loss: Tensor) -> Tensor:
    """`MoEAuxLossAutoScaler`: saves `loss`, whose gradient is made when that of `x` passes."""
    out = t.view(x, x.shape)
    return t.emit("aux_loss", [x, loss], [out], saves=[loss], backward=_attach_backward)[0]


def _attach_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    ones = engine.fresh("ones_like.default", (), FP32)
    scaled = engine.fresh("mul.Tensor", (), FP32)
    engine.free(ones)
    return [gradients[0], scaled]


def keep(t: Trace, x: Tensor, name: str) -> Tensor:
    """``self.name = x``: what the module keeps until its next forward pass; what it kept is freed.

    There is always one of them, so it is a buffer, and what reads it afterwards reads that.
    """
    held = t.buffer(name, *x.dims, dtype=x.dtype)
    out = Tensor(held.storage, x.shape, x.memory, x.dtype, is_view=True)
    return t.emit("setattr", [x], [out], backward=_pass)[0]


def _pass(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return list(gradients)


def all_to_all(t: Trace, x: Tensor, rows: Axis) -> Tensor:
    """`_AllToAll`: a tensor of its own, in backward, too."""
    out = t.fresh("all_to_all", (rows, *x.shape[1:]), x.dtype)
    return t.emit("all_to_all", [x], [out], backward=_all_to_all_backward)[0]


def _all_to_all_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.fresh("all_to_all", op.inputs[0].shape, op.inputs[0].dtype)]


def row_ids(t: Trace, routing: Tensor, width: Dim, blocks: Axis) -> Tensor:
    """`make_row_id_map` ``[tokens, 2 experts + 1]`` of the map `routing` ``[tokens, experts]``.

    Args:
        width: dimension of its rows.
        blocks: how many blocks of tokens are counted one by one for every expert.
    """
    rows = constant(t, "row_id_map", routing, dtype=INT32, shape=(routing.shape[0], (width,)))
    with t.call("") as local:
        local("workspace", constant(t, "row_id_workspace", routing, dtype=INT32, shape=(routing.shape[1], blocks)))
    return rows


def permute(t: Trace, x: Tensor, probabilities: Tensor, ids: Tensor, rows: Axis) -> tuple[Tensor, Tensor]:
    """`moe_permute_with_probs`: copies of tokens `x` ``[tokens, h]`` sorted by expert, and what each counts for."""
    out = t.fresh("permute", (rows, x.shape[1]), x.dtype)
    weights = t.fresh("permute.probs", (rows,), probabilities.dtype)
    inputs = [x, probabilities, ids]
    result = t.emit("permute", inputs, [out, weights], saves=[ids], backward=_permute_backward)
    return result[0], result[1]


def _permute_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Tokens and probabilities in one kernel."""
    results = [engine.prepare("unpermute", each.shape, each.dtype) for each in op.inputs[:2]]
    engine.kernel("unpermute", results)
    return [*results, None]


def unpermute(t: Trace, x: Tensor, ids: Tensor, tokens: Axis) -> Tensor:
    """`moe_unpermute`: the copies of each token are summed."""
    out = t.fresh("unpermute", (tokens, x.shape[1]), x.dtype)
    return t.emit("unpermute", [x, ids], [out], saves=[ids], backward=_unpermute_backward)[0]


def _unpermute_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [engine.fresh("permute", op.inputs[0].shape, op.inputs[0].dtype), None]


def sort_chunks(t: Trace, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`moe_sort_chunks_by_index`, with probabilities or without: one number per row is made and saved."""
    first = tensors[0]
    with t.call("") as local:
        ids = local("row_id_map", constant(t, "chunk_sort_map", first, dtype=INT32, shape=(first.shape[0],)))
        out = [t.fresh("sort_chunks", each.shape, each.dtype) for each in tensors]
        return t.emit("sort_chunks", [*tensors, ids], out, saves=[ids], backward=_sort_backward)


def _sort_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    results = [engine.prepare("sort_chunks", each.shape, each.dtype) for each in op.inputs[:-1]]
    engine.kernel("sort_chunks", results)
    return [*results, None]


def grouped_linear(t: Trace, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`_GroupedLinear`: rows `x` sorted by expert, each expert's with its own ``weight[out, in]``."""
    out = t.fresh("grouped_gemm", (x.shape[0], weights[0].shape[0]), x.dtype)
    inputs = [x, *weights]
    return t.emit("grouped_gemm", inputs, [out], saves=inputs, backward=_grouped_backward)[0]


def _grouped_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The input's gradient, then those of all weights."""
    x, *weights = op.inputs
    for_x = engine.fresh("grouped_gemm", x.shape, x.dtype)
    for_weights = [engine.prepare("grouped_gemm", w.shape, w.dtype) for w in weights]
    engine.kernel("grouped_gemm", for_weights)
    return [for_x, *for_weights]


def weighted_swiglu(t: Trace, x: Tensor, weights: Tensor, half: Axis) -> Tensor:
    """`WeightedSwiGLUFunction`: each row times its probability."""
    out = t.fresh("weighted_swiglu", (x.shape[0], half), x.dtype)
    inputs = [x, weights]
    return t.emit("weighted_swiglu", inputs, [out], saves=inputs, backward=_weighted_swiglu_backward)[0]


def _weighted_swiglu_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    results = [engine.prepare("weighted_swiglu_back", each.shape, each.dtype) for each in op.inputs]
    engine.kernel("weighted_swiglu_back", results)
    return list(results)


def latent_rope_query(t: Trace, query: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """`ApplyMLARotaryEmbQ`: in place, and its backward in place of the gradient."""
    out = t.view(query, query.shape)
    return t.emit("mla_rope_q", [query, *tables], [out], saves=tables, backward=_rope_query_backward)[0]


def _rope_query_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    return [gradients[0], None, None]


def latent_rope_key(
    t: Trace, states: Tensor, turned: Tensor, tables: Sequence[Tensor], shapes: tuple[Shape, Shape]
) -> tuple[Tensor, Tensor]:
    """`ApplyMLARotaryEmbKV`: keys and values of `shapes`, from both parts of the latent."""
    key, value = (t.fresh(f"mla_rope_kv.{i}", shape, states.dtype) for i, shape in enumerate(shapes))
    inputs = [states, turned, *tables]
    result = t.emit("mla_rope_kv", inputs, [key, value], saves=tables, backward=_rope_key_backward)
    return result[0], result[1]


def _rope_key_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    made = [engine.fresh("mla_rope_kv", each.shape, each.dtype) for each in op.inputs[:2]]
    return [*made, None, None]


def fused_attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """CuDNN's flash attention as Transformer Engine calls it, ``[s, b, a, d]``: values may be narrower than keys."""
    sequence, batch, heads, _ = query.shape
    out = t.fresh("fused_attention", (*query.shape[:3], value.shape[-1]), query.dtype)
    statistics = t.fresh("fused_attention.logsumexp", (batch, heads, sequence), FP32)
    inputs, outputs = [query, key, value], [out, statistics]
    return t.emit("fused_attention", inputs, outputs, saves=[*inputs, *outputs], backward=_fused_attention_backward)[0]


def _fused_attention_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Inside: fp32 sums of the query's gradient, and one number a row (cudnn_frontend's ``dQ_accum``, ``dO*O``)."""
    query = op.inputs[0]
    engine.workspace("softmax_sum", query.shape[:3], FP32)
    engine.workspace("dq_accum", query.shape, FP32)
    results = [engine.prepare("fused_attention_backward", x.shape, x.dtype) for x in op.inputs]
    engine.kernel("fused_attention_backward", results)
    return list(results)


def divide(t: Trace, x: Tensor, divisor: Tensor) -> Tensor:
    """``x / divisor``, both of which are saved."""
    out = t.fresh("div.Tensor", x.shape, x.dtype)
    return t.emit("div.Tensor", [x, divisor], [out], saves=[x, divisor], backward=_divide_backward)[0]


def _divide_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The divisor's, ``-grad * ((x / divisor) / divisor)``, comes first (`div_tensor_other_grad`)."""
    x, _ = op.inputs
    factors = [engine.like(name, x) for name in ("div.Tensor", "div.Tensor", "neg.default")]
    for_divisor = engine.like("mul.Tensor", x)
    engine.free(*factors)
    return [engine.like("div.Tensor", x), for_divisor]
