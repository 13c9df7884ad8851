"""Megatron-LM's mixture of experts: router, token dispatcher and experts of megatron/core/transformer/moe/.

As with ``--moe-token-dispatcher-type alltoall --moe-permute-fusion --moe-grouped-gemm`` and Transformer Engine; the
balancing loss is that of each sequence (``seq_aux_loss``). Tokens an expert has no room for are dropped, and what
room is left is padded (``--moe-pad-expert-input-to-capacity``), where there is a capacity factor; else none are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs

from hardware.dtypes import BOOL, FP32, INT64
from hardware.errors import UnsupportedError, UsageError
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.model import ExpertsSpec, FeedForwardSpec, LayerSpec
from simulator.ops import megatron_moe as moe
from simulator.sizes import Dim, ceil_div, product, size_of
from simulator.trace import Frame, Trace

Axis = tuple[Dim, ...]
#: Modules in the order in which they are registered.
ORDER = ("router", "experts", "shared_experts")
#: Families whose router has sigmoid scores and a bias that keeps experts balanced.
SIGMOID = ("deepseek_v3", "kimi_k2")
#: Families whose router takes the softmax of the scores of chosen experts only, unscaled, and whose balancing loss is
#: that of the whole micro-batch (``aux_loss``).
CHOOSE_FIRST = ("mixtral",)
Mlp = Callable[[Trace, Tensor, FeedForwardSpec, str], Tensor]


@attrs.frozen
class _Dispatch:
    """Rows that a rank sends and gets, as dimensions of one axis."""

    sent: Axis
    received: Axis
    capacity: Axis
    """Tokens of one expert from one rank; nothing where there is no capacity."""
    ranks: Axis
    local: Axis


def mixture(t: Trace, x: Tensor, spec: ExpertsSpec, family: str, mlp: Mlp) -> Tensor:
    """`MoELayer` on ``[s, b, h]``.

    Args:
        t: the trace.
        x: normalised hidden states.
        spec: of the layer.
        family: of the model, which decides how the router scores.
        mlp: the MLP of shared experts, given its name.

    Raises:
        UnsupportedError: experts of another kind, or tensor parallelism.
        UsageError: experts that the ranks cannot share evenly.
    """
    _check(t, spec)
    dispatch = _dispatch(t, spec)
    with t.call("mlp", x) as local:
        shared = None
        if spec.shared_width is not None:
            shared = local("shared_expert_output", mlp(t, x, spec.shared, "shared_experts"))
        probabilities, routing = _route(t, x, spec, family)
        with t.call("token_dispatcher"):
            permuted, weights, ids = _permute(t, x, probabilities, routing, dispatch)
        local("hidden_states", permuted)
        local("probs", weights)
        arrived = local("dispatched_input", _exchanged(t, permuted, dispatch.received, dispatch))
        weights = local("probs", _exchanged(t, weights, dispatch.received, dispatch))
        out = local("output", _experts(t, arrived, weights, dispatch, spec))
        out = local("output", _exchanged(t, out, dispatch.sent, dispatch))
        with t.call("", out) as inner:
            flat_out = moe.unpermute(t, out, ids, flat(x.shape[:-1]))
            result = inner("output", ops.view(t, flat_out, x.shape))
            return result if shared is None else ops.add(t, result, shared)


def shared_buffers(t: Trace, layers: Sequence[LayerSpec]) -> None:
    """Losses of all layers that are logged, and the scale of their gradients (moe_utils.py)."""
    if any(isinstance(layer.channel_mixer, ExpertsSpec) for layer in layers):
        t.buffer("aux_losses_tracker", t.dim("L", len(layers)), dtype=FP32)
        t.buffer("main_loss_backward_scale", dtype=FP32)


def _check(t: Trace, spec: ExpertsSpec) -> None:
    ranks = t.regime.expert_parallel
    if t.regime.implementation != "megatron_te":
        raise UnsupportedError("experts are modelled with implementation megatron_te, not megatron: set that")
    if t.regime.tensor_parallel is not None:
        raise UnsupportedError("experts with tensor parallelism in Megatron-LM are not modelled yet: set 'tp' to 1")
    if not spec.gated or spec.bias or spec.latent is not None:
        raise UnsupportedError("experts that are not gated, or have biases, are not modelled with megatron_te")
    if spec.experts % ranks:
        raise UsageError(f"'ep' must divide the {spec.experts} experts: {ranks}; choose another degree")


def _dispatch(t: Trace, spec: ExpertsSpec) -> _Dispatch:
    """`MoEAlltoAllTokenDispatcher.preprocess`."""
    ranks = t.regime.expert_parallel
    tokens, local = _tokens(t), spec.experts // ranks
    over, own = (() if n == 1 else (t.dim(name, n),) for name, n in (("ep", ranks), ("E_local", local)))
    if t.regime.capacity_factor is not None:
        each = (t.dim("C", _room(t, spec)),)
        received = (*over, *own, *each)
        return _Dispatch(received, received, each, over, own)
    copies = tokens * spec.per_token
    most = ranks * tokens * min(spec.per_token, local)
    received = (t.dim("received", min(most, round(copies * (t.regime.imbalance if ranks > 1 else 1)))),)
    return _Dispatch((t.dim("sent", copies),), received, (), over, own)


# router --------------------------------------------------------------------------------------------------------------


def _route(t: Trace, x: Tensor, spec: ExpertsSpec, family: str) -> tuple[Tensor, Tensor]:
    """`TopKRouter`: probabilities ``[tokens, E]`` and a map of which experts every token goes to."""
    experts, sigmoid, choose_first = (t.dim("E", spec.experts),), family in SIGMOID, family in CHOOSE_FIRST
    with t.call("router", x) as local:
        bias = t.buffer("expert_bias", *experts, dtype=FP32) if sigmoid else None
        if sigmoid:
            t.buffer("local_tokens_per_expert", *experts, dtype=FP32)
        logits = local("logits", moe.router_linear(t, x, t.matrix("weight", experts, x.shape[-1])))
        with t.call("") as inner:
            logits = ops.view(t, logits, (flat(x.shape[:-1]), experts))
            parts = _top_k_of_logits(t, logits, spec) if choose_first else _top_k(t, logits, spec, bias)
            probabilities, routing = (inner(n, p) for n, p in zip(("probs", "routing_map"), parts, strict=True))
            if t.regime.capacity_factor is not None:
                routing = inner("routing_map", _room_for(t, probabilities, spec))
            routing = moe.keep(t, routing, "routing_map")  # once the dispatcher has it, which is soon
            if t.regime.capacity_factor is not None:
                probabilities = inner("probs", moe.mask(t, probabilities, routing))
            loss = _balancing_loss(t, logits, spec, inner, sigmoid=sigmoid, whole=choose_first)
            return moe.attach_loss(t, probabilities, loss), routing


def _top_k(t: Trace, logits: Tensor, spec: ExpertsSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`topk_routing_with_score_function`, softmax before the choice or sigmoid, scaled."""
    with t.call("") as local:
        with t.call("") as inner:
            wide = inner("softmax", _scores(t, logits, sigmoid=bias is not None))
            scores = local("scores", ops.to(t, wide, logits.dtype))
        chosen = _choose(t, scores, spec) if bias is None else _choose_by_bias(t, scores, bias, spec)
        probs, indices = (local(name, part) for name, part in zip(("probs", "top_indices"), chosen, strict=True))
        if bias is not None:
            scores = local("scores", probs)
            with t.call("") as inner:
                total = inner("plus", ops.add_scalar(t, inner("sum", ops.sum_last(t, scores))))
                probs = local("probs", moe.divide(t, scores, total))
        probs = local("probs", ops.mul_scalar(t, probs))
        routing = local("routing_probs", moe.scatter(t, logits, indices, probs))
        return routing, moe.chosen(t, logits, indices)


def _top_k_of_logits(t: Trace, logits: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """`topk_routing_with_score_function` without ``use_pre_softmax``."""
    with t.call("") as local:
        scores, indices = _choose(t, logits, spec)
        local("scores", scores)
        local("top_indices", indices)
        with t.call("") as inner:
            probs = local("probs", ops.to(t, inner("softmax", ops.softmax(t, scores, FP32)), logits.dtype))
        routing = local("routing_probs", moe.scatter(t, logits, indices, probs))
        return routing, moe.chosen(t, logits, indices)


def _scores(t: Trace, logits: Tensor, *, sigmoid: bool) -> Tensor:
    if not sigmoid:
        return ops.softmax(t, logits, FP32)
    with t.call("") as local:
        return ops.sigmoid(t, local("float", ops.to(t, logits, FP32)))


def _choose(t: Trace, scores: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """`compute_topk`, in some groups of experts only where there are groups (`group_limited_topk`)."""
    count = (t.dim("K", spec.per_token),)
    if spec.groups == 1:
        return ops.top_k(t, scores, count)
    with t.call("") as local:
        totals = local("group_scores", _group_scores(t, scores, spec, local))
        values, indices = ops.top_k_constant(t, totals, (t.dim("Kg", spec.chosen_groups),))
        with t.call("", values):
            local("group_idx", indices)
        local("group_mask", ops.constant(t, "zeros_like.default", totals))
        spread = local("score_mask", ops.constant(t, "clone.default", scores))
        with t.call("") as inner:
            with t.call("", ops.constant(t, "_to_copy.default", spread, dtype=BOOL)):
                outside = inner("outside", ops.constant(t, "bitwise_not.default", spread, dtype=BOOL))
            masked = local("masked_scores", ops.masked_fill(t, scores, outside))
        return ops.top_k(t, masked, count)


def _group_scores(t: Trace, scores: Tensor, spec: ExpertsSpec, local: Frame) -> Tensor:
    """The best experts' scores of each group, summed; a node of autograd keeps which they were."""
    shape = (scores.shape[0], (t.dim("Eg", spec.groups),))
    best = (*shape, (t.dim("K/Kg", spec.per_token // spec.chosen_groups),))
    values = t.fresh("topk.values", best, scores.dtype)
    indices = local("group_topk", t.fresh("topk.indices", best, INT64))
    t.emit("topk.default", [scores], [values, indices])
    with t.call("", values):
        return ops.constant(t, "sum.dim_IntList", values, shape=shape)


def _choose_by_bias(t: Trace, scores: Tensor, bias: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """Scores of the experts whose scores are highest once the fp32 bias is added."""
    with t.call("") as local:
        biased = local("scores_for_routing", ops.constant(t, "add.Tensor", scores, dtype=bias.dtype))
        values, indices = _choose(t, biased, spec)
        with t.call("", values):
            local("top_indices", indices)
        return ops.gather(t, scores, indices), indices


def _room_for(t: Trace, probabilities: Tensor, spec: ExpertsSpec) -> Tensor:
    """`apply_router_token_dropping`: experts keep their most probable tokens, as many as they have room for."""
    tokens, room = _tokens(t), _room(t, spec)
    with t.call("") as local:
        if room > tokens:
            with t.call("", ops.constant(t, "ones_like.default", probabilities)):
                return ops.constant(t, "_to_copy.default", probabilities, dtype=BOOL)
        shape = ((t.dim("C", room),), probabilities.shape[1])
        values = local("_", t.fresh("topk.values", shape, probabilities.dtype))
        indices = local("capacity_indices", t.fresh("topk.indices", shape, INT64))
        t.emit("topk.default", [probabilities], [values, indices])
        return moe.kept(t, probabilities, indices)


def _balancing_loss(t: Trace, logits: Tensor, spec: ExpertsSpec, local: Frame, *, sigmoid: bool, whole: bool) -> Tensor:
    """`_apply_seq_aux_loss`: how often experts are chosen by each sequence, or by all of them, times their scores."""
    with t.call("") as inner:
        scores = local("scores_for_aux_loss", _loss_scores(t, logits, sigmoid=sigmoid))
        values, indices = ops.top_k_constant(t, scores, (t.dim("K", spec.per_token),))
        inner("_", values)
        inner("top_indices", indices)
        routing = local("routing_map_for_aux_loss", moe.chosen(t, logits, indices))
    each = logits.shape[1] if whole else ("b", *logits.shape[1])
    with t.call("") as inner:
        if not whole:
            scores, routing = (ops.view(t, x, (("s",), each)) for x in (scores, routing))
        counts = inner("tokens_per_expert", ops.constant(t, "sum.dim_IntList", routing, dtype=INT64, shape=(each,)))
        with t.call("") as loss:
            totals = loss("aggregated", ops.sum_axis(t, scores, 0))
            summed = ops.sum_all(t, loss("product", moe.mask(t, totals, counts)))
            scaled = inner("aux_loss", ops.mul_scalar(t, summed))
        return scaled if whole else inner("aux_loss", ops.div_scalar(t, scaled))


def _loss_scores(t: Trace, logits: Tensor, *, sigmoid: bool) -> Tensor:
    """`compute_routing_scores_for_aux_loss`: in fp32 where they are a softmax."""
    if not sigmoid:
        return ops.softmax(t, logits, FP32)
    with t.call("") as local:
        scores = local("scores", ops.sigmoid(t, logits))
        with t.call("") as inner:
            total = inner("plus", ops.add_scalar(t, inner("sum", ops.sum_last(t, scores))))
            return moe.divide(t, scores, total)


# dispatch ------------------------------------------------------------------------------------------------------------


def _permute(
    t: Trace, x: Tensor, probabilities: Tensor, routing: Tensor, dispatch: _Dispatch
) -> tuple[Tensor, Tensor, Tensor]:
    """`dispatch_preprocess`: the module keeps probabilities, map and permutation until its next forward pass."""
    probabilities = moe.keep(t, probabilities, "probs")
    if dispatch.local or dispatch.capacity:
        t.buffer("num_global_tokens_per_local_expert", *routing.shape[1], dtype=INT64)
    orders = ["sort_input_by_local_experts", "restore_output_by_local_experts"]
    for name in orders if dispatch.ranks and dispatch.local else orders[:1]:  # else both are views of one
        t.buffer(name, *routing.shape[1], dtype=INT64)
    sizes = t.dimensions.bindings
    width = t.dim("2E+1", 2 * int(product(routing.shape[1], sizes)) + 1)
    blocks = (t.dim("token_blocks", ceil_div(_tokens(t), moe.PERMUTATION_BLOCK)),)
    made = moe.row_ids(t, routing, width, blocks)
    with t.call("", made):  # stands for the last one, which goes when the function has returned
        ids = moe.keep(t, made, "reversed_local_input_permutation_mapping")
        tokens = ops.view(t, x, (flat(x.shape[:-1]), x.shape[-1]))
        return *moe.permute(t, tokens, probabilities, ids, dispatch.sent), ids


def _exchanged(t: Trace, x: Tensor, rows: Axis, dispatch: _Dispatch) -> Tensor:
    """`all_to_all` over the ranks that share the experts."""
    return moe.all_to_all(t, x, rows) if dispatch.ranks else x


def _experts(t: Trace, x: Tensor, weights: Tensor, dispatch: _Dispatch, spec: ExpertsSpec) -> Tensor:
    """`routed_experts_compute`: `TEGroupedMLP` on rows sorted by local expert, and back in the order they came."""
    with t.call("", x, weights) as local:
        with t.call("", x, weights):
            x, weights = _by_expert(t, x, weights, dispatch)
        local("dispatched_input", x)
        local("permuted_probs", weights)
        width = (t.dim("f", spec.width),)
        with t.call("experts") as inner:
            fused = inner("fc1_output", _grouped(t, "linear_fc1", x, (2, *width), spec))
            active = inner("bias_act_output", moe.weighted_swiglu(t, fused, weights, width))
            out = _grouped(t, "linear_fc2", active, x.shape[1], spec)
        out = local("expert_output", out)
        return _by_rank(t, out, dispatch)


def _grouped(t: Trace, name: str, x: Tensor, out: Axis, spec: ExpertsSpec) -> Tensor:
    """`TEGroupedLinear`: a weight for each of the rank's experts."""
    with t.call(name):
        count = spec.experts // t.regime.expert_parallel
        weights = [t.matrix(f"weight{i}", out, x.shape[1]) for i in range(count)]
        ranks = t.dim("ep", t.regime.expert_parallel)
        for weight in weights if t.regime.expert_parallel > 1 else ():
            weight.storage.whole = size_of((ranks, *weight.dims), weight.dtype.bits)
            t.graph.expert_parallel.add(weight.storage)
        return moe.grouped_linear(t, x, weights)


def _by_expert(t: Trace, x: Tensor, weights: Tensor, dispatch: _Dispatch) -> tuple[Tensor, Tensor]:
    """`dispatch_postprocess`: rows of each expert together."""
    if not dispatch.local:
        return x, weights
    if not dispatch.capacity:
        sorted_rows = moe.sort_chunks(t, x, weights)
        return sorted_rows[0], sorted_rows[1]
    axes = (dispatch.ranks, dispatch.local, dispatch.capacity)
    return _swapped(t, x, axes), _swapped(t, weights, axes)


def _by_rank(t: Trace, x: Tensor, dispatch: _Dispatch) -> Tensor:
    """`combine_preprocess`: rows of each rank together."""
    if not dispatch.local:
        return x
    if not dispatch.capacity:
        return moe.sort_chunks(t, x)[0]
    return _swapped(t, x, (dispatch.local, dispatch.ranks, dispatch.capacity))


def _swapped(t: Trace, x: Tensor, axes: tuple[Axis, Axis, Axis]) -> Tensor:
    """``x.view(first, second, capacity, ...).transpose(0, 1).contiguous().flatten(0, 2)``."""
    apart = ops.view(t, x, (*axes, *x.shape[1:]))
    together = ops.contiguous(t, ops.transpose(t, apart, 0, 1))
    return ops.view(t, together, (flat(together.shape[:3]), *x.shape[1:]))


def _tokens(t: Trace) -> int:
    return int(t.dimensions.bindings["s"]) * int(t.dimensions.bindings["b"])


def _room(t: Trace, spec: ExpertsSpec) -> int:
    """`get_capacity`."""
    factor = t.regime.capacity_factor
    assert factor is not None
    return math.ceil(_tokens(t) * spec.per_token / spec.experts * factor)
