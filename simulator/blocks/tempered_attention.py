"""Attention whose queries are rotated and normed, or scaled by the logarithm of their positions (arXiv:2501.19399).

Follows `Llama4TextAttention` of transformers 5.23 (models/llama4/modeling_llama4.py).
"""

from __future__ import annotations

from hardware.dtypes import FP32, INT64
from simulator import ops
from simulator.blocks.attention import Softmax, attention
from simulator.blocks.heads import head_dims
from simulator.blocks.latent_attention import rotate_complex
from simulator.blocks.linear import projection
from simulator.blocks.norms import unit_norm
from simulator.graph import Tensor
from simulator.model import AttentionSpec, TemperedAttentionSpec
from simulator.trace import Frame, Trace


def tempered_attention(
    t: Trace, x: Tensor, table: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """`Llama4TextAttention`."""
    heads, key_heads, d = head_dims(t, spec)
    with t.call("self_attn", x) as local:
        made = {}
        for name, own in (("q", heads), ("k", key_heads), ("v", key_heads)):
            states = projection(t, f"{name}_proj", x, (*own, d), spec.bias)
            made[name] = local(name, ops.reshape(t, states, (*x.shape[:-1], own, (d,))))
        if spec.rotary:
            turned = rotate_complex(t, made["q"], made["k"], table)
            made |= {name: local(name, each) for name, each in zip(("q", "k"), turned, strict=True)}
        if spec.query_norm:
            made |= {name: local(name, unit_norm(t, made[name])) for name in ("q", "k")}
        assert isinstance(spec, TemperedAttentionSpec)
        if spec.tempered and not spec.rotary:
            made["q"] = local("q", _tempered(t, made["q"], local))
        query, key, value = (local(name, ops.transpose(t, each, 1, 2)) for name, each in made.items())
        out, weights = attention(t, query, key, value, mask, spec, Softmax.PLAIN)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*heads, d))))
        return projection(t, "o_proj", out, ("h",), spec.out_bias), weights


def _tempered(t: Trace, query: Tensor, local: Frame) -> Tensor:
    """Queries ``[b, s, a, d]`` scaled by the logarithm of their positions (arXiv:2501.19399)."""
    row = (("s",),)
    places = local("positions", ops.constant(t, "arange.default", query, dtype=INT64, shape=row))
    with t.call("") as inner:
        scales = inner("scale", ops.constant(t, "_to_copy.default", places, dtype=FP32))
        for name in ("add.Tensor", "div.Tensor", "floor.default", "log1p.default", "mul.Tensor", "add.Tensor"):
            scales = inner("scale", ops.constant(t, name, scales))
    scales = local("attn_scales", ops.view(t, scales, (("s",), (), ())))
    return ops.to(t, ops.mul(t, query, scales), query.dtype)
