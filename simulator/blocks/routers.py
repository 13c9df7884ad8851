"""Routers: which experts a token visits, and with what weights."""

from __future__ import annotations

from collections.abc import Callable

from hardware.dtypes import BOOL, FP32, INT64, DType
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.model import ExpertsSpec
from simulator.sizes import Dim
from simulator.trace import Frame, Trace

#: Tokens ``[tokens, h]`` to router logits, and to the weights and indices ``[tokens, K]`` of the experts chosen.
Router = Callable[[Trace, Tensor, ExpertsSpec], tuple[Tensor, Tensor, Tensor]]


def softmax_router(
    t: Trace, x: Tensor, spec: ExpertsSpec, *, low_weights: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """`MixtralTopKRouter` (models/mixtral/modeling_mixtral.py) and `Qwen3MoeTopKRouter`: softmax, then top-k.

    Args:
        low_weights: whether weights return to the dtype of the logits (Qwen); else they stay fp32 (Mixtral).
    """
    with t.call("gate", x) as local:
        x = local("hidden_states", ops.view(t, x, x.shape))
        logits = local("router_logits", ops.linear(t, x, _router_weight(t, x, spec)))
        scores = local("router_probs", ops.softmax(t, logits, FP32))
        weights, indices = ops.top_k(t, scores, _chosen(t, spec))
        local("router_top_value", weights)
        local("router_indices", indices)
        if spec.normalised:
            with t.call("") as inner:
                weights = ops.divide_in_place(t, weights, inner("sum", ops.sum_last(t, weights)))
            local("router_top_value", weights)
        if low_weights:
            weights = local("router_top_value", ops.to(t, weights, logits.dtype))
        return logits, weights, indices


def sigmoid_router(t: Trace, x: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`MiniMaxM2TopKRouter` (models/minimax_m2/modeling_minimax_m2.py): sigmoid scores, chosen by corrected ones."""
    t.buffer("e_score_correction_bias", t.dim("E", spec.experts), dtype=t.regime.weights)
    with t.call("gate", x) as local:
        x = local("hidden_states", ops.view(t, x, x.shape))
        logits = local("router_logits", ops.linear(t, x, _router_weight(t, x, spec)))
        with t.call("") as inner:
            scores = local("routing_weights", ops.sigmoid(t, inner("logits", ops.to(t, logits, FP32))))
        corrected = local("scores_for_choice", ops.constant(t, "add.Tensor", scores))
        values, indices = ops.top_k_constant(t, corrected, _chosen(t, spec))
        local("_", values)
        local("top_k_index", indices)
        weights = local("top_k_weights", ops.gather(t, scores, indices))
        with t.call("") as inner:
            weights = ops.divide_in_place(t, weights, inner("sum", ops.sum_last(t, weights)))
        local("top_k_weights", weights)
    return logits, weights, indices


def grouped_sigmoid_router(
    t: Trace, x: Tensor, spec: ExpertsSpec, *, correction: DType | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`Glm4MoeTopkRouter` (models/glm4_moe/modeling_glm4_moe.py): fp32 scores, groups of experts, then experts.

    Args:
        correction: element type of ``e_score_correction_bias``; None for that of the weights (DeepSeek-V3).
    """
    with t.call("gate", x) as local:
        t.buffer("e_score_correction_bias", t.dim("E", spec.experts), dtype=correction or t.regime.weights)
        x = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        logits = local("router_logits", _fp32_logits(t, x, spec))
        scores = local("scores", ops.sigmoid(t, logits))
        indices = local("topk_indices", _choose_in_groups(t, scores, spec, local))
        weights = local("topk_weights", ops.gather(t, scores, indices))
        if spec.normalised:
            with t.call("") as inner:
                total = local("denominator", ops.add_scalar(t, inner("sum", ops.sum_last(t, weights))))
            weights = local("topk_weights", ops.divide_in_place(t, weights, total))
        weights = local("topk_weights", ops.mul_scalar(t, weights))
    return logits, weights, indices


def scaled_softmax_router(t: Trace, x: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`DeepseekV2TopkRouter` (models/deepseek_v2/modeling_deepseek_v2.py): fp32 scores, weights scaled.

    With several groups those with the best expert are chosen first (``group_limited_greedy``).
    """
    with t.call("gate", x) as local:
        x = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        logits = local("router_logits", _fp32_logits(t, x, spec))
        scores = local("scores", ops.softmax(t, logits, FP32))
        if spec.groups > 1:
            best = local("group_scores", _best_of_groups(t, scores, spec))
            scores = local("scores", ops.masked_fill(t, scores, _outside_groups(t, best, scores, spec, local)))
        weights, indices = ops.top_k(t, scores, _chosen(t, spec))
        local("topk_weights", weights)
        local("topk_indices", indices)
        weights = local("topk_weights", ops.mul_scalar(t, weights))
    return logits, weights, indices


def chosen_softmax_router(t: Trace, x: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`GraniteMoeHybridTopKRouter` (models/granitemoehybrid/modeling_granitemoehybrid.py): top-k, then softmax."""
    with t.call("router", x) as local:
        with t.call("") as inner:
            low = inner("logits", ops.linear(t, x, _router_weight(t, x, spec)))
            logits = local("router_logits", ops.to(t, low, FP32))
        chosen, indices = ops.top_k(t, logits, _chosen(t, spec))
        local("top_k_logits", chosen)
        local("top_k_index", indices)
        with t.call("") as inner:
            weights = inner("softmax", ops.softmax(t, chosen))
            weights = local("top_k_weights", ops.to(t, weights, x.dtype))
    return logits, weights, indices


def _fp32_logits(t: Trace, x: Tensor, spec: ExpertsSpec) -> Tensor:
    """``F.linear(x.type(torch.float32), weight.type(torch.float32))``."""
    weight = _router_weight(t, x, spec)
    with t.call("") as inner:
        low = inner("input", ops.to(t, x, FP32))
        return ops.linear(t, low, inner("weight", ops.to(t, weight, FP32)))


def _choose_in_groups(t: Trace, scores: Tensor, spec: ExpertsSpec, local: Frame) -> Tensor:
    """Indices of a token's experts, in the groups whose two best experts add up to most; nothing differentiates it.

    Args:
        local: the frame of the router, in which everything lives that a name or a node of the graph holds.
    """
    rows = scores.shape[0]
    group = (t.dim("Eg", spec.groups),)
    corrected = local("scores_for_choice", ops.constant(t, "add.Tensor", scores, dtype=FP32))
    best, kept = ops.top_k_constant(t, corrected, (*group, 2))
    local("kept", kept)
    with t.call("", best):
        totals = local("group_scores", ops.constant(t, "sum.dim_IntList", best, shape=(rows, group)))
    inverted = local("inverted", _outside_groups(t, totals, scores, spec, local))
    corrected = local("scores_for_choice", ops.constant(t, "masked_fill.Scalar", inverted, dtype=FP32))
    return _best(t, corrected, _chosen(t, spec))


def _best_of_groups(t: Trace, scores: Tensor, spec: ExpertsSpec) -> Tensor:
    """``scores.view(...).max(dim=-1).values``: the indices go at once."""
    shape = (scores.shape[0], (t.dim("Eg", spec.groups),))
    values = ops.constant(t, "max.values", scores, shape=shape)
    with t.call("", ops.constant(t, "max.indices", scores, dtype=INT64, shape=shape)):
        return values


def _outside_groups(t: Trace, totals: Tensor, scores: Tensor, spec: ExpertsSpec, local: Frame) -> Tensor:
    """Where `scores` are of experts outside the groups that have most of `totals`: bool ``[tokens, experts]``."""
    local("group_idx", _best(t, totals, (t.dim("Kg", spec.chosen_groups),)))
    mask = local("group_mask", ops.constant(t, "zeros_like.default", totals))
    if spec.groups > 1:  # one group's mask is expanded in a view
        mask = local("score_mask", ops.constant(t, "clone.default", mask, shape=scores.shape))
    with t.call("", ops.constant(t, "_to_copy.default", mask, dtype=BOOL, shape=scores.shape)):
        return ops.constant(t, "bitwise_not.default", mask, dtype=BOOL, shape=scores.shape)


def _best(t: Trace, x: Tensor, kept: tuple[Dim, ...]) -> Tensor:
    """``torch.topk(x, k)[1]``: the values go at once."""
    values, indices = ops.top_k_constant(t, x, kept)
    with t.call("", values):
        return indices


def _router_weight(t: Trace, x: Tensor, spec: ExpertsSpec) -> Tensor:
    return t.matrix("weight", (t.dim("E", spec.experts),), x.shape[-1])


def _chosen(t: Trace, spec: ExpertsSpec) -> tuple[Dim, ...]:
    return (t.dim("K", spec.per_token),)


def top_k_router(t: Trace, x: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`GptOssTopKRouter` (models/gpt_oss/modeling_gpt_oss.py): top-k of biased logits, then softmax over those."""
    with t.call("router", x) as local:
        weight = _router_weight(t, x, spec)
        logits = local("router_logits", ops.linear(t, x, weight, t.vector("bias", weight.shape[0])))
        values, indices = ops.top_k(t, logits, _chosen(t, spec))
        local("router_top_value", values)
        local("router_indices", indices)
        return logits, local("router_scores", ops.softmax(t, values, values.dtype)), indices
