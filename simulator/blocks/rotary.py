"""Rotary positions (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Callable

from hardware.dtypes import FP32, DType
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.model import AttentionSpec
from simulator.sizes import Dim, product
from simulator.trace import Trace

#: Queries, keys, cosines and sines to rotated queries and keys.
Rotate = Callable[[Trace, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def rotary_tables(
    t: Trace, spec: AttentionSpec, like: Tensor, *, kind: str = "", cast: bool = True, doubled: bool = True
) -> tuple[Tensor, Tensor]:
    """`LlamaRotaryEmbedding.forward`: cos and sin of shape ``[s, rotated channels]``, or half of them.

    With context parallelism they are of each sequence, ``[b, s, rotated channels]``.

    Args:
        spec: the attention whose heads are rotated.
        like: hidden states, whose dtype the tables take.
        kind: start of the buffers' names, where there are tables for several kinds of layers (Gemma 3).
        cast: whether they take it; else they are fp32 (OLMo 2).
        doubled: whether both halves of a head have columns of their own; else they share them (gpt-oss).
    """
    with t.call("rotary_emb") as local:
        whole = spec.rotated == spec.head_dim
        d = t.dim("d" if whole else "d_rotated", spec.rotated)
        half = t.dim(f"{d}/2", spec.rotated // 2)
        frequencies = t.buffer(f"{kind}inv_freq", half, dtype=FP32)
        t.buffer(f"{kind}original_inv_freq", half, dtype=FP32)
        # positions that the caller gives are those of each sequence
        rows = (("b",), ("s",)) if t.regime.context_parallel is not None else (("s",),)
        freqs = local("freqs", ops.constant(t, "mul.Tensor", frequencies, shape=(*rows, (half,))))
        emb = local("emb", ops.constant(t, "cat.default", freqs, shape=(*rows, (d,))) if doubled else freqs)
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


def liger_rotate(t: Trace, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`liger_rotary_pos_emb` (liger_kernel/transformers/rope.py), whichever `apply_rotary_pos_emb` it replaces.

    Raises:
        UnsupportedError: rotary positions on a part of each head, which it cannot do.
    """
    if cos.shape[-1] != query.shape[-1]:
        raise UnsupportedError("'liger' rope turns whole heads, and this model a part of each: leave rope out")
    with t.call("", query, key):
        query, key = ops.liger_rotary(t, query, key, cos, sin)
        return query, key


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


def rotate_halves(t: Trace, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` with tables that both halves of a head share (models/gpt_oss/modeling_gpt_oss.py)."""
    with t.call("", query, key) as local:
        return local("q_embed", _apply_to_halves(t, query, cos, sin)), _apply_to_halves(t, key, cos, sin)


def _apply_to_halves(t: Trace, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_apply_rotary_emb`: both halves, then one behind the other."""
    with t.call("", x) as local:
        halves = ops.split(t, x, (*x.shape[:-1], cos.shape[-1]), 2)
        first, second = (local(name, half) for name, half in zip(("first", "second"), halves, strict=True))
        turned: list[Tensor] = []
        for combine, a, b in ((ops.sub, first, second), (ops.add, second, first)):
            with t.call("") as inner:
                direct = inner("direct", ops.mul(t, a, cos))
                crossed = inner("crossed", ops.mul(t, b, sin))
                turned.append(local(f"turned{len(turned)}", combine(t, direct, crossed)))
        return ops.cat(t, turned, x.shape, flat(x.shape))


def rotate_part(
    t: Trace, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *, join_late: bool = False, rebind: bool = False
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of the leading channels of each head (models/phi3/modeling_phi3.py).

    Args:
        join_late: whether both are rotated before the rest is put behind them (models/nemotron/modeling_nemotron.py).
        rebind: whether what is then joined takes the names of what was rotated (models/glm/modeling_glm.py).
    """
    with t.call("", query, key) as local:
        cut = [cut_rotated(t, x, cos.shape[-1]) for x in (query, key)]
        if join_late:
            turned = [local(f"embed{i}", apply_rotary(t, first, cos, sin)) for i, (first, _) in enumerate(cut)]
            for i, (x, (_, rest)) in enumerate(zip(turned, cut, strict=True)):
                turned[i] = join_rotated(t, x, rest, query)
                if rebind:
                    local(f"embed{i}", turned[i])
            return turned[0], turned[1]
        embeds: list[Tensor] = []
        for x, (first, rest) in zip((query, key), cut, strict=True):
            embeds.append(local(f"embed{len(embeds)}", join_rotated(t, apply_rotary(t, first, cos, sin), rest, x)))
        return embeds[0], embeds[1]


def half(t: Trace, axis: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """Half of an axis of one dimension."""
    (d,) = axis
    return (t.dim(f"{d}/2", t.dimensions.bindings[str(d)] // 2),)


def cut_rotated(t: Trace, x: Tensor, rotated: tuple[Dim, ...]) -> tuple[Tensor, Tensor]:
    """Leading channels and the rest, which is empty where all are rotated: its gradient is whole all the same."""
    sizes = t.dimensions.bindings
    rest = t.dim("d_passed", product(x.shape[-1], sizes) - product(rotated, sizes))
    first = x if x.shape[-1] == rotated else ops.narrow(t, x, (*x.shape[:-1], rotated))
    return first, ops.narrow(t, x, (*x.shape[:-1], (rest,)))


def join_rotated(t: Trace, first: Tensor, rest: Tensor, like: Tensor) -> Tensor:
    """Rotated channels and the rest behind them, as many as `like` has."""
    shape = (*first.shape[:-1], like.shape[-1])
    return ops.cat(t, [first, rest], shape, flat(shape))


def apply_rotary(t: Trace, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One half of `apply_rotary_pos_emb`: ``x * cos + rotate_half(x) * sin``."""
    direct = ops.mul(t, x, cos)
    rotated = ops.mul(t, _rotate_half(t, x), sin)
    return ops.add(t, direct, rotated)


def _rotate_half(t: Trace, x: Tensor) -> Tensor:
    with t.call("", x) as local:
        parts = ops.slices(t, x, (*x.shape[:-1], half(t, x.shape[-1])), 2)
        first, second = (local(n, part) for n, part in zip(("x1", "x2"), parts, strict=True))
        return ops.cat(t, [ops.neg(t, second), first], x.shape, x.memory)
