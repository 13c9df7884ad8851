"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from one low-rank latent.

Follows `DeepseekV3Attention` of transformers 5.23 (models/deepseek_v3/modeling_deepseek_v3.py), whose V2 differs in
how positions turn: pairs of channels as complex numbers there, even and odd slices here.
"""

from __future__ import annotations

import attrs

from hardware.dtypes import COMPLEX64, FP32
from simulator import ops
from simulator.blocks.attention import attention
from simulator.blocks.linear import projection
from simulator.blocks.norms import llama_rms_norm
from simulator.blocks.rotary import apply_rotary
from simulator.graph import Shape, Tensor, flat
from simulator.model import AttentionSpec, LatentAttentionSpec
from simulator.sizes import Dim
from simulator.trace import Trace


@attrs.frozen
class _Dims:
    """Names of the dimensions of one layer's heads."""

    heads: tuple[Dim, ...]
    whole: Dim
    """Channels of a query or key."""
    plain: Dim
    """Those without a position."""
    rotary: Dim
    value: Dim
    expanded: Dim
    """Of a key without a position and a value, side by side."""


def _dims(t: Trace, spec: LatentAttentionSpec) -> _Dims:
    return _Dims(
        heads=(t.dim("a", spec.heads),),
        whole=t.dim("d", spec.head_dim),
        plain=t.dim("d_plain", spec.plain_dim),
        rotary=t.dim("d_rotary", spec.rotated),
        value=t.dim("d_value", spec.value_dim),
        expanded=t.dim("d_expanded", spec.plain_dim + spec.value_dim),
    )


def latent_attention(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, spec: LatentAttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """Output ``[b, s, h]`` of latent attention on `x` ``[b, s, h]``, and the weights of eager attention.

    Args:
        t: the trace.
        x: normalised hidden states.
        tables: cosines and sines, or one table of complex numbers.
        mask: additive or boolean, or None.
        spec: sizes of the layer.
    """
    d = _dims(t, spec)
    with t.call("self_attn", x) as local:
        queries = local("q", _queries(t, x, d, spec))
        plain, turned = _parts(t, queries, (d.plain, d.rotary))
        local("q_pass", plain)
        local("q_rot", turned)
        latent = t.dim("latent", spec.latent)
        joint = t.dim("latent+rotary", spec.latent + spec.rotated)
        compressed = local("compressed_kv", projection(t, "kv_a_proj_with_mqa", x, (joint,), spec.bias))
        states, key = (local(n, v) for n, v in zip(("kv", "k"), _parts(t, compressed, (latent, d.rotary)), strict=True))
        states = local("kv", llama_rms_norm(t, "kv_a_layernorm", states))
        turned, key = _turn(t, turned, key, tables, spec)
        local("q_rot", turned)
        local("k", key)
        query = local("query", ops.cat(t, [plain, turned], queries.shape, flat(queries.shape)))
        keys, values = _expand(t, states, key, d)
        local("keys", keys)
        local("values", values)
        out, weights = attention(t, query, keys, values, mask, spec)
        if weights is not None:
            local("weights", weights)
        out = local("out", ops.reshape(t, out, (*x.shape[:-1], (*d.heads, d.value))))
        return projection(t, "o_proj", out, ("h",), spec.bias), weights


def _queries(t: Trace, x: Tensor, d: _Dims, spec: LatentAttentionSpec) -> Tensor:
    """``[b, a, s, d]``, through a low rank where there is one."""
    out = (*d.heads, d.whole)
    if spec.query_rank is None:
        states = projection(t, "q_proj", x, out, bias=False)
    else:
        rank = (t.dim("query_rank", spec.query_rank),)
        states = llama_rms_norm(t, "q_a_layernorm", projection(t, "q_a_proj", x, rank, spec.bias))
        states = projection(t, "q_b_proj", states, out, bias=False)
    return ops.transpose(t, ops.reshape(t, states, (*x.shape[:-1], d.heads, (d.whole,))), 1, 2)


def _parts(t: Trace, x: Tensor, widths: tuple[Dim, ...]) -> tuple[Tensor, ...]:
    """``torch.split`` of the last axis."""
    return ops.split_with_sizes(t, x, [(*x.shape[:-1], (width,)) for width in widths])


def _expand(t: Trace, states: Tensor, key: Tensor, d: _Dims) -> tuple[Tensor, Tensor]:
    """`expand_kv`: keys ``[b, a, s, d]`` from the latent and the one turned key, and values ``[b, a, s, v]``."""
    with t.call("", states, key) as local:
        rows = states.shape[:2]
        expanded = projection(t, "kv_b_proj", states, (*d.heads, d.expanded), bias=False)
        expanded = local("kv", ops.transpose(t, ops.reshape(t, expanded, (*rows, d.heads, (d.expanded,))), 1, 2))
        plain, values = _parts(t, expanded, (d.plain, d.value))
        local("k_nope", plain)
        local("values", values)
        key = local("k_rot", ops.expand(t, key, (rows[0], d.heads, rows[1], (d.rotary,))))
        return ops.filled(t, [plain, key], (rows[0], d.heads, rows[1], (d.whole,))), values


def _turn(
    t: Trace, query: Tensor, key: Tensor, tables: tuple[Tensor, ...], spec: LatentAttentionSpec
) -> tuple[Tensor, Tensor]:
    """Both rotated by their positions."""
    if len(tables) == 1:
        return _turn_complex(t, query, key, tables[0])
    with t.call("", query, key) as local:
        turn = _turn_pairs if spec.interleaved else apply_rotary
        query = local("q_embed", turn(t, query, *tables))
        return query, turn(t, key, *tables)


def _half(t: Trace, x: Tensor) -> Shape:
    """The shape of every second channel of `x`."""
    (last,) = x.shape[-1]
    return (*x.shape[:-1], (t.dim(f"{last}/2", t.dimensions.bindings[str(last)] // 2),))


def _turn_pairs(t: Trace, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`apply_rotary_pos_emb_interleave`: even and odd channels are the pairs."""
    first, second = ops.slices(t, x, _half(t, x), 2)
    with t.call("", first, second):
        parts = []
        for combine, a, b in ((ops.sub, first, second), (ops.add, second, first)):
            with t.call("") as local:
                parts.append(combine(t, local("a", ops.mul(t, a, cos)), local("b", ops.mul(t, b, sin))))
        return ops.cat(t, parts, x.shape, flat(x.shape))


def _turn_complex(t: Trace, query: Tensor, key: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_emb` (models/deepseek_v2/modeling_deepseek_v2.py)."""
    return rotate_complex(t, query, key, table, cast_late=False)


def rotate_complex(
    t: Trace, query: Tensor, key: Tensor, table: Tensor, *, cast_late: bool = True
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_emb`: pairs of channels turn as complex numbers.

    Args:
        cast_late: whether both are turned before either returns to its dtype (models/llama4/modeling_llama4.py).
    """
    with t.call("", query, key) as local:
        pairs = []
        for name, x in (("xq_", query), ("xk_", key)):
            wide = ops.to(t, x, FP32)
            pairs.append(local(name, ops.as_complex(t, wide, _half(t, x))))
        turned = []
        for name, pair, x in zip(("xq_out", "xk_out"), pairs, (query, key), strict=True):
            with t.call("") as inner:
                product = inner("product", ops.mul(t, pair, table))
                real = ops.as_real(t, product, x.shape)
                turned.append(local(name, real if cast_late else ops.to(t, real, x.dtype)))
        query, key = (ops.to(t, each, x.dtype) for each, x in zip(turned, (query, key), strict=True))
        return query, key


def complex_rotary_table(t: Trace, spec: AttentionSpec, _: Tensor, **__: str) -> tuple[Tensor]:
    """`DeepseekV2RotaryEmbedding.forward`: ``exp(i m theta)`` of shape ``[s, d / 2]``, complex."""
    with t.call("rotary_emb") as local:
        name = "d" if spec.rotated == spec.head_dim else "d_rotary"
        half = t.dim(f"{name}/2", spec.rotated // 2)
        frequencies = t.buffer("inv_freq", half, dtype=FP32)
        t.buffer("original_inv_freq", half, dtype=FP32)
        freqs = local("freqs", ops.constant(t, "mul.Tensor", frequencies, shape=(("s",), (half,))))
        with t.call("") as inner:
            inner("ones", ops.constant(t, "ones_like.default", freqs))
            table = ops.constant(t, "polar.default", freqs, dtype=COMPLEX64)
        local("freqs_cis", table)
        return (ops.constant(t, "mul.Tensor", table),)
