"""Rotary positions (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.model import AttentionSpec
from simulator.trace import Trace


def rotary_tables(t: Trace, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """`LlamaRotaryEmbedding.forward`: cos and sin of shape ``[s, d]`` in the dtype of the hidden states."""
    with t.call("rotary_emb") as local:
        d = t.dim("d", head_dim)
        half = t.dim(f"{d}/2", head_dim // 2)
        frequencies = t.buffer("inv_freq", half, dtype=FP32)
        t.buffer("original_inv_freq", half, dtype=FP32)
        freqs = local("freqs", ops.constant(t, "mul.Tensor", frequencies, shape=(("s",), (half,))))
        emb = local("emb", ops.constant(t, "cat.default", freqs, shape=(("s",), (d,))))
        tables = []
        for name in ("cos", "sin"):
            raw = ops.constant(t, f"{name}.default", emb)
            tables.append(local(name, ops.constant(t, "mul.Tensor", raw)))
        cos, sin = (ops.to(t, table, like.dtype) for table in tables)
        return cos, sin


def apply_rotary(t: Trace, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """One half of `apply_rotary_pos_emb`: ``x * cos + rotate_half(x) * sin``."""
    direct = ops.mul(t, x, cos)
    rotated = ops.mul(t, _rotate_half(t, x), sin)
    return ops.add(t, direct, rotated)


def partial_rotary(
    t: Trace, query: Tensor, key: Tensor, tables: tuple[Tensor, ...], spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_pos_emb` of GPT-NeoX: the first channels of each head turn, the others pass."""
    rotary = (t.dim("d_rotary", spec.rotary_width),)
    passing = (t.dim("d_pass", spec.head_dim - spec.rotary_width),)
    with t.call("", query, key) as local:
        parts = []
        for name, x in (("q", query), ("k", key)):
            turning = local(f"{name}_rot", ops.narrow(t, x, (*x.shape[:-1], rotary)))
            parts.append((x, turning, local(f"{name}_pass", ops.narrow(t, x, (*x.shape[:-1], passing)))))
        turned = [local(f"embed{i}", apply_rotary(t, part[1], *tables)) for i, part in enumerate(parts)]
        found = []
        for i, (embed, (x, _, plain)) in enumerate(zip(turned, parts, strict=True)):
            found.append(local(f"embed{i}", ops.cat(t, [embed, plain], x.shape, flat(x.shape))))
        return found[0], found[1]


def _rotate_half(t: Trace, x: Tensor) -> Tensor:
    with t.call("", x) as local:
        d = x.shape[-1][0]
        half = (*x.shape[:-1], (t.dim(f"{d}/2", t.dimensions.bindings[str(d)] // 2),))
        first, second = (local(n, part) for n, part in zip(("x1", "x2"), ops.slices(t, x, half, 2), strict=True))
        return ops.cat(t, [ops.neg(t, second), first], x.shape, x.memory)
