"""The load-balancing loss of Switch Transformers (Fedus et al., arXiv:2101.03961, equations 4 to 6).

Follows `load_balancing_loss_func` (models/mixtral/modeling_mixtral.py): a loop over the logits of all routers.
"""

from __future__ import annotations

from hardware.dtypes import FP32, INT32
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.trace import Frame, Trace

_SUMS = ("tokens_per_expert_sum", "router_prob_sum")


def add_load_balancing_loss(t: Trace, loss: Tensor) -> tuple[Tensor, Tensor]:
    """``loss += coefficient * aux_loss``, as `MixtralForCausalLM.forward` ends: the sum, and the added loss."""
    balance = _load_balancing_loss(t)
    with t.call("", balance) as local:
        return ops.add_into(t, loss, local("weighted", ops.mul_scalar(t, balance))), balance


def _load_balancing_loss(t: Trace) -> Tensor:
    mask = next((x for x in t.graph.inputs if x.storage.label == "attention_mask"), None)
    first = next(iter(t.router_logits.values()))
    with t.call("load_balancing_loss_func") as local:
        for name in _SUMS:
            local(name, ops.constant(t, "zeros.default", first, dtype=FP32, shape=first.shape[1:]))
        if mask is not None:
            flat = ops.constant(t, "_to_copy.default", mask, dtype=FP32, shape=first.shape[:1])
            local("flat_mask", flat)
        for slot, logits in t.router_logits.items():
            with t.turn(slot):
                _add_layer(t, logits, local, masked=mask is not None)
        return _overall(t, local, masked=mask is not None)


def _add_layer(t: Trace, logits: Tensor, local: Frame, *, masked: bool) -> None:
    """One turn of the loop: adds how many tokens each expert got, and how probable it was."""
    weights = local("routing_weights", ops.softmax(t, logits))
    values, chosen = ops.top_k_constant(t, weights, ("K",))
    local("_", values)
    local("selected_experts", chosen)
    with t.call("") as inner:
        inner("counts", _masked_counts(t, chosen, local) if masked else _counts(t, chosen, local))
        local(_SUMS[0], ops.constant(t, "add.Tensor", local.held(_SUMS[0])))
    wide = ops.to(t, weights, FP32)
    if masked:
        column = ops.view(t, local.held("flat_mask"), (*wide.shape[:1], ()), "unsqueeze.default")
        wide = ops.mul(t, wide, column)
    local(_SUMS[1], ops.add(t, local.held(_SUMS[1]), ops.sum_axis(t, wide, 0)))
    if masked:
        with t.call("") as inner:
            inner("rows", ops.constant(t, "sum.default", column, shape=()))
            local("total_rows", ops.constant(t, "add.Tensor", column, shape=()))


def _counts(t: Trace, chosen: Tensor, local: Frame) -> Tensor:
    """How many tokens chose each expert, fp32 or int32 ``[experts]``."""
    low = ops.constant(t, "_to_copy.default", chosen, dtype=INT32, shape=(flat(chosen.shape),))
    with t.call("", low):
        return ops.constant(t, "histc.default", low, shape=local.held(_SUMS[0]).shape)


def _masked_counts(t: Trace, chosen: Tensor, local: Frame) -> Tensor:
    """As `_counts`, padding left out: the mask is repeated for all experts of a token and added up."""
    counts = ops.constant(t, "zeros.default", local.held(_SUMS[0]))
    repeated = ops.constant(t, "clone.default", local.held("flat_mask"), shape=(flat(chosen.shape),))
    return t.emit("scatter_add_.default", [counts, chosen, repeated], [t.view(counts, counts.shape)])[0]


def _overall(t: Trace, local: Frame, *, masked: bool) -> Tensor:
    """The mean share of tokens times the mean probability, summed over experts."""
    counts, total = (local.held(name) for name in _SUMS)
    share = local("tokens_per_expert", ops.constant(t, "div.Tensor", counts))
    mean = ops.div_constant(t, total, local.held("total_rows")) if masked else ops.div_scalar(t, total)
    mean = local("router_prob_per_expert", mean)
    row = ops.view(t, mean, ((), *mean.shape), "unsqueeze.default")
    overall = local("overall_loss", ops.sum_all(t, ops.mul(t, share, row)))
    return ops.mul_scalar(t, overall)
