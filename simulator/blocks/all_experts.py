"""Experts that all see all tokens, each scaled by its score, which is 0 where a token has not chosen the expert.

Follows transformers 5.23 models/llama4/modeling_llama4.py, which leaves dispatch to tensor parallelism.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator import ops
from simulator.blocks.feed_forward import activation, gated_mlp
from simulator.graph import Shape, Tensor, flat
from simulator.model import ExpertsSpec
from simulator.trace import Trace


def all_experts_mlp(t: Trace, x: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """`Llama4TextMoe`: output ``[tokens, h]`` and the router's logits."""
    experts = (t.dim("E", spec.experts),)
    with t.call("feed_forward", x) as local:
        tokens = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        scores, logits = _router(t, tokens, spec)
        local("router_scores", scores)
        local("router_logits", logits)
        rows = (*experts, *tokens.shape[0])
        repeated = ops.clone(t, tokens, (experts, *tokens.shape))
        routed = local("routed_in", ops.view(t, repeated, (rows, tokens.shape[1])))
        column = ops.reshape(t, ops.transpose(t, scores, 0, 1), (rows, ()))
        routed = local("routed_in", ops.mul(t, routed, column))
        outputs = local("routed_out", _all_experts(t, routed, spec, (experts, *tokens.shape)))
        names = ("shared_expert", "gate_proj", "up_proj", "down_proj")
        out = local("out", gated_mlp(t, tokens, spec.shared, names))
        parts = ops.reshape(t, outputs, (experts, *tokens.shape))
        return ops.add_into(t, out, ops.sum_axis(t, parts, 0)), logits


def _router(t: Trace, x: Tensor, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """`Llama4Router`: scores ``[tokens, experts]``, 0 for experts that are not chosen, and logits."""
    with t.call("router", x) as local:
        weight = t.matrix("weight", (t.dim("E", spec.experts),), x.shape[-1])
        logits = local("router_logits", ops.linear(t, x, weight))
        values, indices = ops.top_k(t, logits, (t.dim("K", spec.per_token),))
        local("router_top_value", values)
        local("router_indices", indices)
        scores = local("router_scores", ops.scattered(t, logits, indices, values))
        opened = ops.sigmoid(t, ops.to(t, scores, FP32))
        scores = local("router_scores", ops.to(t, opened, scores.dtype))
        return scores, logits


def _all_experts(t: Trace, x: Tensor, spec: ExpertsSpec, shape: Shape) -> Tensor:
    """`Llama4TextExperts`: one batched product for all experts, tokens of each side by side."""
    width, both = (t.dim("f", spec.width),), (t.dim("2f", 2 * spec.width),)
    with t.call("experts", x) as local:
        hidden = local("hidden_states", ops.view(t, x, shape))
        out = local("gate_up", ops.autocast_bmm(t, hidden, t.weights("gate_up_proj", shape[0], shape[2], both)))
        gate, up = ops.split(t, out, (*shape[:2], width), 2)
        local("gate", gate)
        local("up", up)
        with t.call("act_fn", gate):
            active = activation(t, spec.activation, gate)
        product = ops.mul(t, up, active)
        states = ops.autocast_bmm(t, product, t.weights("down_proj", shape[0], width, shape[2]))
        return ops.view(t, local("next_states", states), x.shape)
