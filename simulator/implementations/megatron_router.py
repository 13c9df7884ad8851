"""Megatron-LM's router: which tokens go to which experts (megatron/core/transformer/moe/router.py, moe_utils.py).

``moe_router_dtype`` is left out, so logits have the weights' element type; routing is not fused.
"""

from __future__ import annotations

import math

from hardware.dtypes import BOOL, FP32, INT64
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.model import ExpertsSpec
from simulator.ops import megatron_moe as moe
from simulator.trace import Frame, Trace

#: Families whose router has sigmoid scores and a bias that keeps experts balanced.
SIGMOID = ("deepseek_v3", "kimi_k2")
#: Families whose router takes the softmax of the scores of chosen experts only, unscaled, and whose balancing loss is
#: that of the whole micro-batch (``aux_loss``).
CHOOSE_FIRST = ("mixtral",)


def route(t: Trace, x: Tensor, spec: ExpertsSpec, family: str) -> tuple[Tensor, Tensor]:
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
    count, capacity = tokens(t), room(t, spec)
    with t.call("") as local:
        if capacity > count:
            with t.call("", ops.constant(t, "ones_like.default", probabilities)):
                return ops.constant(t, "_to_copy.default", probabilities, dtype=BOOL)
        shape = ((t.dim("C", capacity),), probabilities.shape[1])
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


def tokens(t: Trace) -> int:
    """Tokens of a micro-batch."""
    return int(t.dimensions.bindings["s"]) * int(t.dimensions.bindings["b"])


def room(t: Trace, spec: ExpertsSpec) -> int:
    """`get_capacity`."""
    factor = t.regime.capacity_factor
    assert factor is not None
    return math.ceil(tokens(t) * spec.per_token / spec.experts * factor)
