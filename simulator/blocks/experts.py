"""Mixtures of experts: routers, experts and the MLPs made of both (Shazeer et al., arXiv:1701.06538)."""

from __future__ import annotations

from collections.abc import Callable

from hardware.dtypes import BOOL, FP32, DType
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks.feed_forward import Feed, activation, gated_mlp
from simulator.graph import Tensor, flat
from simulator.model import ExpertsSpec, FeedForwardSpec
from simulator.sizes import Dim, product
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
    """`DeepseekV2TopkRouter` (models/deepseek_v2/modeling_deepseek_v2.py), greedy: fp32 scores, weights scaled."""
    with t.call("gate", x) as local:
        x = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        logits = local("router_logits", _fp32_logits(t, x, spec))
        scores = local("scores", ops.softmax(t, logits, FP32))
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
    rows, experts = scores.shape
    group = (t.dim("Eg", spec.groups),)
    corrected = local("scores_for_choice", ops.constant(t, "add.Tensor", scores, dtype=FP32))
    best, kept = ops.top_k_constant(t, corrected, (*group, 2))
    local("kept", kept)
    with t.call("", best):
        totals = local("group_scores", ops.constant(t, "sum.dim_IntList", best, shape=(rows, group)))
    local("group_idx", _best(t, totals, (t.dim("Kg", spec.chosen_groups),)))
    mask = local("group_mask", ops.constant(t, "zeros_like.default", totals))
    if spec.groups > 1:  # one group's mask is expanded in a view
        mask = local("score_mask", ops.constant(t, "clone.default", mask, shape=(rows, experts)))
    with t.call("") as inner:
        chosen = inner("chosen", ops.constant(t, "_to_copy.default", mask, dtype=BOOL, shape=(rows, experts)))
        inverted = local("inverted", ops.constant(t, "bitwise_not.default", chosen))
    corrected = local("scores_for_choice", ops.constant(t, "masked_fill.Scalar", inverted, dtype=FP32))
    return _best(t, corrected, _chosen(t, spec))


def _best(t: Trace, x: Tensor, kept: tuple[Dim, ...]) -> Tensor:
    """``torch.topk(x, k)[1]``: the values go at once."""
    values, indices = ops.top_k_constant(t, x, kept)
    with t.call("", values):
        return indices


def _router_weight(t: Trace, x: Tensor, spec: ExpertsSpec) -> Tensor:
    return t.matrix("weight", (t.dim("E", spec.experts),), x.shape[-1])


def _chosen(t: Trace, spec: ExpertsSpec) -> tuple[Dim, ...]:
    return (t.dim("K", spec.per_token),)


def experts_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, *, router: Router) -> Tensor:
    """`MixtralSparseMoeBlock` (models/mixtral/modeling_mixtral.py): every token through the experts chosen for it."""
    assert isinstance(spec, ExpertsSpec)
    with t.call("mlp", x) as local:
        tokens = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        routed = router(t, tokens, spec)
        for name, tensor in zip(("_", "top_k_weights", "top_k_index"), routed, strict=True):
            local(name, tensor)
        out = local("hidden_states", grouped_experts(t, tokens, routed[1], routed[2], spec))
        return ops.reshape(t, out, x.shape)


def gated_shared_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, *, router: Router) -> Tensor:
    """`Qwen2MoeSparseMoeBlock` (models/qwen2_moe/modeling_qwen2_moe.py): a shared MLP behind a gate of its own."""
    assert isinstance(spec, ExpertsSpec)
    with t.call("mlp", x) as local:
        tokens = local("hidden_states_reshaped", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        shared = local("shared_expert_output", gated_mlp(t, tokens, spec.shared, _shared_names("shared_expert")))
        routed = router(t, tokens, spec)
        for name, tensor in zip(("_", "routing_weights", "selected_experts"), routed, strict=True):
            local(name, tensor)
        out = local("expert_output", grouped_experts(t, tokens, routed[1], routed[2], spec))
        with t.call("") as inner:
            with t.call("shared_expert_gate", tokens):
                one = (t.dim("shared_gate", 1),)
                score = inner("score", ops.linear(t, tokens, t.matrix("weight", one, tokens.shape[-1])))
            score = inner("gate", ops.sigmoid(t, score))
            shared = local("shared_expert_output", ops.mul(t, score, shared))
        out = local("expert_output", ops.add(t, out, shared))
        return ops.reshape(t, out, x.shape)


def experts_and_shared_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, *, router: Router) -> Tensor:
    """`Glm4MoeMoE` (models/glm4_moe/modeling_glm4_moe.py), `DeepseekV3MoE`: the sum of experts and a shared MLP."""
    assert isinstance(spec, ExpertsSpec)
    with t.call("mlp", x) as local:
        routed = router(t, x, spec)
        for name, tensor in zip(("_", "topk_weights", "topk_indices"), routed, strict=True):
            local(name, tensor)
        tokens = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        out = grouped_experts(t, tokens, routed[1], routed[2], spec)
        out = local("hidden_states", ops.reshape(t, out, x.shape))
        with t.call("") as inner:
            shared = inner("shared", gated_mlp(t, x, spec.shared, _shared_names("shared_experts")))
            return ops.add(t, out, shared)


def _shared_names(module: str) -> tuple[str, ...]:
    return (module, "gate_proj", "up_proj", "down_proj")


def experts_or_gated_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, *, block: Feed) -> Tensor:
    """`block` where a layer has experts, a gated MLP where it has none."""
    return block(t, x, spec) if isinstance(spec, ExpertsSpec) else gated_mlp(t, x, spec)


def grouped_experts(t: Trace, x: Tensor, weights: Tensor, indices: Tensor, spec: ExpertsSpec) -> Tensor:
    """`grouped_mm_experts_forward` (integrations/moe.py): token copies sorted by expert, one product for all experts.

    How many tokens an expert is sent decides no size: all copies together are tokens times `per_token`.
    """
    if t.regime.experts != "grouped_mm":
        raise UnsupportedError(f"'experts' must be grouped_mm: {t.regime.experts!r} is not modelled yet")
    _check_aligned(t, x, spec)
    pairs, experts, width = flat(indices.shape), (t.dim("E", spec.experts),), t.dim("f", spec.width)
    with t.call("experts", x, indices, weights) as local:
        sample_weights = local("sample_weights", ops.reshape(t, weights, (pairs,)))
        ids, permutation = ops.sort(t, local("expert_ids", ops.reshape(t, indices, (pairs,))))
        local("expert_ids_g", ids)
        local("perm", permutation)
        with t.call("") as inner:
            sources = inner("sources", ops.constant(t, "floor_divide.default", permutation))
            rows = local("selected_hidden_states_g", ops.index(t, x, sources))
        sample_weights = local("sample_weights_g", ops.index(t, sample_weights, permutation))
        offsets = ops.group_ends(t, ids, experts)
        ends = [local(f"offsets{i}", each) for i, each in enumerate(offsets)][-1]
        name, up = ("gate_up_proj", (2, width)) if spec.gated else ("up_proj", (width,))
        weight = t.weights(name, experts, up, x.shape[-1])
        out = local("proj_out", ops.grouped_linear(t, rows, weight, ends, up))
        out = local("proj_out", _gate(t, out, (width,), spec) if spec.gated else activation(t, spec.activation, out))
        weight = t.weights("down_proj", experts, x.shape[-1], (width,))
        out = local("proj_out", ops.grouped_linear(t, out, weight, ends, x.shape[-1]))
        with t.call("") as inner:
            column = inner("column", ops.reshape(t, sample_weights, (pairs, ())))
            weighted = local("weighted_out", ops.mul(t, out, column))
        inverse = local("inv_perm", ops.inverse_permutation(t, permutation))
        weighted = local("weighted_out", ops.index(t, weighted, inverse))
        parts = ops.reshape(t, weighted, (x.shape[0], indices.shape[1], x.shape[-1]))
        out = local("final_hidden_states", ops.sum_axis(t, parts, 1))
        return ops.to(t, out, x.dtype)


def _check_aligned(t: Trace, x: Tensor, spec: ExpertsSpec) -> None:
    """Refuse rows that `torch._grouped_mm` does (aten/src/ATen/native/GroupedMMUtils.h: strides of whole 16 bytes)."""
    elements = 16 * 8 // t.regime.weights.bits
    hidden = product(x.shape[-1], t.dimensions.bindings)
    for name, size in (("hidden", hidden), ("width", spec.width)):
        if size % elements:
            raise UnsupportedError(
                f"'experts' grouped_mm takes rows of whole 16 bytes: {name} must be a multiple of {elements} with "
                f"weights of {t.regime.weights.name}, not {size}"
            )


def _gate(t: Trace, x: Tensor, width: tuple[Dim, ...], spec: ExpertsSpec) -> Tensor:
    """`_default_apply_gate` (integrations/moe.py)."""
    with t.call("", x) as local:
        gate, up = ops.split(t, x, (x.shape[0], width), 2)
        local("gate", gate)
        local("up", up)
        with t.call("act_fn", gate):
            active = activation(t, spec.activation, gate)
        return ops.mul(t, active, up)
