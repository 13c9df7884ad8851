"""Rotary positions (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

from hardware.dtypes import FP32, DType
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.model import AttentionSpec
from simulator.sizes import Dim, product
from simulator.trace import Trace

#: Queries, keys, cosines and sines to rotated queries and keys.
Rotate = Callable[[Trace, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rotary_tables(
    t: Trace, spec: AttentionSpec, like: Tensor, *, kind: str = "", cast: bool = True
) -> tuple[Tensor, Tensor]:
    """`LlamaRotaryEmbedding.forward`: cos and sin of shape ``[s, rotated channels]``.

    Args:
        spec: the attention whose heads are rotated.
        like: hidden states, whose dtype the tables take.
        kind: start of the buffers' names, where there are tables for several kinds of layers (Gemma 3).
        cast: whether they take it; else they are fp32 (OLMo 2).
    """
    with t.call("rotary_emb") as local:
        whole = spec.rotated == spec.head_dim
        d = t.dim("d" if whole else "d_rotated", spec.rotated)
        half = t.dim(f"{d}/2", spec.rotated // 2)
        frequencies = t.buffer(f"{kind}inv_freq", half, dtype=FP32)
        t.buffer(f"{kind}original_inv_freq", half, dtype=FP32)
        freqs = local("freqs", ops.constant(t, "mul.Tensor", frequencies, shape=(("s",), (half,))))
        emb = local("emb", ops.constant(t, "cat.default", freqs, shape=(("s",), (d,))))
        tables = []
        for name in ("cos", "sin"):
            raw = ops.constant(t, f"{name}.default", emb)
            tables.append(local(name, ops.constant(t, "mul.Tensor", raw)))
        cos, sin = (ops.to(t, table, like.dtype if cast else FP32) for table in tables)
        return cos, sin


def grid_rotary_tables(t: Trace, spec: AttentionSpec, like: Tensor, *, kind: str = "") -> tuple[Tensor, Tensor]:
    """`Qwen3_5TextRotaryEmbedding.forward`: cos and sin ``[b, s, rotated channels]`` of positions in time and a grid.

    Args:
        spec: the attention whose heads are rotated.
        like: hidden states, whose dtype the tables take.
        kind: start of the buffers' names.
    """
    with t.call("rotary_emb") as local:
        d = t.dim("d" if spec.rotated == spec.head_dim else "d_rotated", spec.rotated)
        half = t.dim(f"{d}/2", spec.rotated // 2)
        frequencies = t.buffer(f"{kind}inv_freq", half, dtype=FP32)
        t.buffer(f"{kind}original_inv_freq", half, dtype=FP32)
        with t.call("") as inner:
            places = inner("float", ops.constant(t, "_to_copy.default", frequencies, shape=((3,), ("b",), ("s",))))
            freqs = local("freqs", ops.constant(t, "mul.Tensor", places, shape=(*places.shape, (half,))))
        for name in ("cos", "sin"):
            local(name, ops.constant(t, "mul.Tensor", ops.constant(t, f"{name}.default", freqs)))
        for name in ("sin", "cos"):
            local(name, ops.constant(t, "cat.default", local.held(name), shape=(("b",), ("s",), (d,))))
        return ops.to(t, local.held("cos"), like.dtype), ops.to(t, local.held("sin"), like.dtype)


def rotate(t: Trace, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` (models/llama/modeling_llama.py)."""
    with t.call("", query, key) as local:
        return local("q_embed", apply_rotary(t, query, cos, sin)), apply_rotary(t, key, cos, sin)


def rotate_in(
    t: Trace, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, compute: DType | None = None
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` that returns to the dtype of its inputs (models/olmo2/modeling_olmo2.py).

    Args:
        compute: what queries and keys are cast to first (models/cohere2/modeling_cohere2.py); None leaves them.
    """
    dtypes = (query.dtype, key.dtype)
    with t.call("", query, key) as local:
        states = [local(n, ops.to(t, x, compute or x.dtype)) for n, x in (("q", query), ("k", key))]
        turned = [local(f"embed{i}", apply_rotary(t, x, cos, sin)) for i, x in enumerate(states)]
        query, key = (ops.to(t, x, dtype) for x, dtype in zip(turned, dtypes, strict=True))
        return query, key


def rotate_part(
    t: Trace, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, join_late: bool = False, rebind: bool = False
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of the leading channels of each head (models/phi3/modeling_phi3.py).

    Args:
        join_late: whether both are rotated before the rest is put behind them (models/nemotron/modeling_nemotron.py).
        rebind: whether what is then joined takes the names of what was rotated (models/glm/modeling_glm.py).
    """
    with t.call("", query, key) as local:
        cut = [_cut(t, x, cos.shape[-1]) for x in (query, key)]
        if join_late:
            turned = [local(f"embed{i}", apply_rotary(t, first, cos, sin)) for i, (first, _) in enumerate(cut)]
            for i, (x, (_, rest)) in enumerate(zip(turned, cut, strict=True)):
                turned[i] = _join(t, x, rest, query)
                if rebind:
                    local(f"embed{i}", turned[i])
            return turned[0], turned[1]
        embeds: list[Tensor] = []
        for x, (first, rest) in zip((query, key), cut, strict=True):
            embeds.append(local(f"embed{len(embeds)}", _join(t, apply_rotary(t, first, cos, sin), rest, x)))
        return embeds[0], embeds[1]


def _cut(t: Trace, x: Tensor, rotated: tuple[Dim, ...]) -> tuple[Tensor, Tensor]:
    """Leading channels and the rest, which is empty where all are rotated: its gradient is whole all the same."""
    sizes = t.dimensions.bindings
    rest = t.dim("d_passed", product(x.shape[-1], sizes) - product(rotated, sizes))
    first = x if x.shape[-1] == rotated else ops.narrow(t, x, (*x.shape[:-1], rotated))
    return first, ops.narrow(t, x, (*x.shape[:-1], (rest,)))


def _join(t: Trace, first: Tensor, rest: Tensor, like: Tensor) -> Tensor:
    shape = (*first.shape[:-1], like.shape[-1])
    return ops.cat(t, [first, rest], shape, flat(shape))


def apply_rotary(t: Trace, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One half of `apply_rotary_pos_emb`: ``x * cos + rotate_half(x) * sin``."""
    direct = ops.mul(t, x, cos)
    rotated = ops.mul(t, _rotate_half(t, x), sin)
    return ops.add(t, direct, rotated)


def _rotate_half(t: Trace, x: Tensor) -> Tensor:
    with t.call("", x) as local:
        d = x.shape[-1][0]
        half = (*x.shape[:-1], (t.dim(f"{d}/2", t.dimensions.bindings[str(d)] // 2),))
        first, second = (local(n, part) for n, part in zip(("x1", "x2"), ops.slices(t, x, half, 2), strict=True))
        return ops.cat(t, [ops.neg(t, second), first], x.shape, x.memory)
