"""Multi-head latent attention as Megatron-LM writes it (megatron/core/transformer/multi_latent_attention.py).

YaRN's tables and Transformer Engine's modules, with rotary positions applied by one kernel (``apply_rope_fusion``);
norms of both latents (``qk_layernorm``) are one module with the projection after them, which copies what has gaps.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.graph import Tensor
from simulator.model import LatentAttentionSpec
from simulator.ops import megatron, megatron_moe
from simulator.sizes import Dim
from simulator.trace import Trace

Axis = tuple[Dim, ...]
#: `original_max_position_embeddings` of `MLATransformerConfig`, for which tables are made at first.
ORIGINAL_POSITIONS = 4096
#: Modules in the order in which they are registered.
ORDER = (
    "linear_proj",
    *("linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
    *("linear_kv_down_proj", "linear_kv_up_proj"),
    *("q_layernorm", "kv_layernorm"),
)


def latent_attention(t: Trace, x: Tensor, spec: LatentAttentionSpec) -> Tensor:
    """`MLASelfAttention` on ``[s, b, h]``.

    Raises:
        UnsupportedError: another implementation than Megatron's own modules of Transformer Engine, or a mask.
    """
    _check(t)
    heads = (t.dim("a", spec.heads),)
    with t.call("self_attention", x) as local:
        parts = zip(("query", "key", "value"), _query_key_value(t, x, heads, spec), strict=True)
        query, key, value = (local(name, part) for name, part in parts)
        out = megatron_moe.fused_attention(t, query, key, value)
        out = local("core_attn_out", ops.view(t, out, (*out.shape[:2], (*heads, *out.shape[3]))))
        return _linear(t, "linear_proj", out, ("h",))


def _check(t: Trace) -> None:
    regime = t.regime
    if regime.implementation != "megatron_te" or regime.tensor_parallel is not None:
        raise UnsupportedError("latent attention is modelled with implementation megatron_te and 'tp' 1 alone")
    for field, only in (("attention", "sdpa"), ("attention_mask", "none")):
        if getattr(regime, field) != only:
            raise UnsupportedError(f"{field!r} must be {only} with implementation megatron_te: leave it out")


def _linear(t: Trace, name: str, x: Tensor, out: Axis) -> Tensor:
    with t.call(name):
        return megatron.fused_linear(t, x, t.matrix("weight", out, x.shape[-1]), None, out)


def _query_key_value(t: Trace, x: Tensor, heads: Axis, spec: LatentAttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`get_query_key_value_tensors`: queries and keys ``[s, b, a, d]``, values ``[s, b, a, v]``."""
    whole, turned = (t.dim("d", spec.head_dim),), (t.dim("d_rotary", spec.rotated),)
    latent = (t.dim("latent", spec.latent),)
    tables = _tables(t, turned, spec)
    with t.call("") as local:
        compressed = x
        if spec.query_rank is not None:
            compressed = local("q", _linear(t, "linear_q_down_proj", x, (t.dim("query_rank", spec.query_rank),)))
        joint = _linear(t, "linear_kv_down_proj", x, (t.dim("latent+rotary", spec.latent + spec.rotated),))
        local("kv_combined", joint)
        states, key = ops.split_with_sizes(t, joint, [(*joint.shape[:-1], part) for part in (latent, turned)])
        local("k_pos_emb", key)
        if spec.query_rank is not None:
            compressed = local("q", _norm(t, "q_layernorm", compressed))
        states = local("kv_compressed", _norm(t, "kv_layernorm", states))
        with t.call("") as inner:
            name = "linear_q_proj" if spec.query_rank is None else "linear_q_up_proj"
            query = inner("q", _linear(t, name, compressed, (*heads, *whole)))
            query = ops.view(t, query, (*query.shape[:2], heads, whole))
            expanded = (t.dim("d_expanded", spec.plain_dim + spec.value_dim),)
            both = inner("kv", _linear(t, "linear_kv_up_proj", states, (*heads, *expanded)))
            both = ops.view(t, both, (*both.shape[:2], heads, expanded))
            key = ops.view(t, key, (*key.shape[:2], (), turned))
            query = megatron_moe.latent_rope_query(t, query, tables)
            shapes = (query.shape, (*query.shape[:3], (t.dim("d_value", spec.value_dim),)))
            return query, *megatron_moe.latent_rope_key(t, both, key, tables, shapes)


def _norm(t: Trace, name: str, x: Tensor) -> Tensor:
    with t.call(name, x) as local:
        inner = local("inp", ops.contiguous(t, x))
        return ops.rms_norm(t, inner, t.parameter("weight", *x.shape[-1]))


def _tables(t: Trace, turned: Axis, spec: LatentAttentionSpec) -> tuple[Tensor, Tensor]:
    """`YarnRotaryEmbedding.get_cached_cos_sin`: every layer's own; all angles stay in ``lru_cache``."""
    with t.call("rotary_pos_emb"):
        for name in ("inv_freq", "inv_freq_extra", "inv_freq_inter"):
            t.buffer(name, t.dim("d_rotary/2", spec.rotated // 2), dtype=FP32)
        original = t.dim("s_original", ORIGINAL_POSITIONS)
        for positions in ["s"] if t.dimensions.bindings["s"] == ORIGINAL_POSITIONS else ["s", original]:
            t.buffer(f"emb_{positions}", positions, *turned, dtype=FP32)
        cos, sin = (t.buffer(f"{name}_cached", "s", *turned, dtype=t.regime.weights) for name in ("cos", "sin"))
    return cos, sin
