"""Attention whose output is gated: the gate comes with the queries from one projection."""

from __future__ import annotations

from simulator import ops
from simulator.blocks.attention import attention
from simulator.blocks.heads import Norm, head_dims
from simulator.blocks.linear import projection
from simulator.blocks.rotary import rotate_part
from simulator.graph import Tensor
from simulator.model import AttentionSpec
from simulator.trace import Trace


def gated_attention(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, spec: AttentionSpec, *, norm: Norm
) -> tuple[Tensor, Tensor | None]:
    """`Qwen3NextAttention` (models/qwen3_next/modeling_qwen3_next.py); its output and the weights.

    Args:
        x: hidden states ``[b, s, h]``.
        tables: cos and sin of the channels that are rotated.
        norm: of each head of queries and keys.
    """
    heads, key_heads, d = head_dims(t, spec)
    rows = x.shape[:-1]
    with t.call("self_attn", x) as local:
        made = projection(t, "q_proj", x, (*heads, 2, d), spec.bias)
        query, gate = ops.split(t, ops.view(t, made, (*rows, heads, (2, d))), (*rows, heads, (d,)), 2)
        query, gate = local("query_states", query), local("gate", gate)
        if gate.shape[2]:  # between the gates of two heads lies a query
            gate = ops.clone(t, gate)
        gate = local("gate", ops.view(t, gate, (*rows, (*heads, d))))
        query = norm(t, "q_norm", ops.view(t, query, query.shape))
        query = local("query_states", ops.transpose(t, query, 1, 2))
        key = ops.view(t, projection(t, "k_proj", x, (*key_heads, d), spec.bias), (*rows, key_heads, (d,)))
        key = local("key_states", ops.transpose(t, norm(t, "k_norm", key), 1, 2))
        value = ops.view(t, projection(t, "v_proj", x, (*key_heads, d), spec.bias), (*rows, key_heads, (d,)))
        value = local("value_states", ops.transpose(t, value, 1, 2))
        query, key = rotate_part(t, query, key, *tables, join_late=True, rebind=True)
        local("query_states", query)
        local("key_states", key)
        out, weights = attention(t, query, key, value, mask, spec)
        local("attn_output", out)
        if weights is not None:
            local("attn_weights", weights)
        out = local("attn_output", ops.reshape(t, out, gate.shape))
        out = local("attn_output", ops.mul(t, out, ops.sigmoid(t, gate)))
        return projection(t, "o_proj", out, ("h",), spec.out_bias), weights
