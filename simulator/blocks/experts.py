"""Mixtures of experts: the MLPs made of routers and experts (Shazeer et al., arXiv:1701.06538)."""

from __future__ import annotations

from simulator import ops
from simulator.blocks.feed_forward import Feed, gated_mlp
from simulator.blocks.forms import PLAIN, Form
from simulator.blocks.routed_experts import routed_experts
from simulator.blocks.routers import Router
from simulator.graph import Tensor, flat
from simulator.model import ExpertsSpec, FeedForwardSpec
from simulator.trace import Trace


def experts_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, *, router: Router, form: Form = PLAIN) -> Tensor:
    """`MixtralSparseMoeBlock` (models/mixtral/modeling_mixtral.py): every token through the experts chosen for it."""
    return experts_and_scores(t, x, spec, router=router, form=form)[0]


def experts_and_scores(
    t: Trace, x: Tensor, spec: FeedForwardSpec, *, router: Router, form: Form = PLAIN
) -> tuple[Tensor, Tensor]:
    """As `experts_mlp`, with the weights of the experts chosen (`GptOssMLP`, models/gpt_oss/modeling_gpt_oss.py)."""
    assert isinstance(spec, ExpertsSpec)
    with t.call("mlp", x) as local:
        tokens = local("hidden_states", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        routed = router(t, tokens, spec)
        t.capture(routed[0])
        for name, tensor in zip(("_", "top_k_weights", "top_k_index"), routed, strict=True):
            local(name, tensor)
        out = local("hidden_states", routed_experts(t, tokens, routed[1], routed[2], spec, form))
        return ops.reshape(t, out, x.shape), routed[1]


def gated_shared_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, *, router: Router) -> Tensor:
    """`Qwen2MoeSparseMoeBlock` (models/qwen2_moe/modeling_qwen2_moe.py): a shared MLP behind a gate of its own."""
    assert isinstance(spec, ExpertsSpec)
    with t.call("mlp", x) as local:
        tokens = local("hidden_states_reshaped", ops.reshape(t, x, (flat(x.shape[:-1]), x.shape[-1])))
        shared = local("shared_expert_output", gated_mlp(t, tokens, spec.shared, _shared_names("shared_expert")))
        routed = router(t, tokens, spec)
        t.capture(routed[0])
        for name, tensor in zip(("_", "routing_weights", "selected_experts"), routed, strict=True):
            local(name, tensor)
        out = local("expert_output", routed_experts(t, tokens, routed[1], routed[2], spec))
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
        out = routed_experts(t, tokens, routed[1], routed[2], spec)
        out = local("hidden_states", ops.reshape(t, out, x.shape))
        with t.call("") as inner:
            shared = inner("shared", gated_mlp(t, x, spec.shared, _shared_names("shared_experts")))
            return ops.add(t, out, shared)


def _shared_names(module: str) -> tuple[str, ...]:
    return (module, "gate_proj", "up_proj", "down_proj")


def experts_or_gated_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, *, block: Feed) -> Tensor:
    """`block` where a layer has experts, a gated MLP where it has none."""
    return block(t, x, spec) if isinstance(spec, ExpertsSpec) else gated_mlp(t, x, spec)
