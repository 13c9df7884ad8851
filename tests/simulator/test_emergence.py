"""Known closed forms fall out of the op library; none of them is in the code."""

from __future__ import annotations

import sympy

from hardware.dtypes import BF16
from simulator import ops
from simulator.graph import Storage
from simulator.sizes import Dimensions, symbol
from simulator.trace import Regime, Trace

B, S, A, D = ("b",), ("s",), ("a",), ("d",)
H = (*A, *D)


def linear(t, name, x, out):
    with t.call(name, x):
        return ops.linear(t, x, t.matrix("weight", out, x.shape[-1]), t.vector("bias", out), out)


def layer_norm(t, name, x):
    with t.call(name, x):
        return ops.layer_norm(t, x, t.parameter("weight", *H), t.parameter("bias", *H))


def megatron_layer(t, x):
    """The layer of arXiv 2205.05198, figure 2: sequence first, fused softmax and GeLU, two residual dropouts."""
    fused = linear(t, "qkv", layer_norm(t, "ln_1", x), (3, *H))
    query, key, value = ops.split(t, fused, (S, B, H), 3)
    batches = [ops.reshape(t, part, (S, (*B, *A), D)) for part in (query, key, value)]
    query, key, value = (ops.transpose(t, part, 0, 1) for part in batches)
    weights = ops.softmax(t, ops.bmm(t, query, ops.transpose(t, key, 1, 2)))
    context = ops.transpose(t, ops.bmm(t, ops.dropout(t, weights, 0.1), value), 0, 1)
    context = ops.reshape(t, ops.contiguous(t, context), (S, B, H))
    x = ops.add(t, ops.dropout(t, linear(t, "projection", context, H), 0.1), x)
    wide = ops.gelu(t, linear(t, "up", layer_norm(t, "ln_2", x), (4, *H)))
    return ops.add(t, ops.dropout(t, linear(t, "down", wide, H), 0.1), x)


def saved(t) -> list[Storage]:
    edges = t.graph.edges.edges(data=True)
    return list(dict.fromkeys(s for s, _, why in edges if "saves" in why and not s.persistent))


def test_saved_bytes_of_a_megatron_layer():
    """s b h (34 + 5 a s / h) bytes per layer (arXiv 2205.05198, equation 1; it leaves out the norms' statistics)."""
    t = Trace(Regime(weights=BF16), Dimensions())
    x = t.parameter("x", *S, *B, *H)
    x.shape, x.storage.persistent = (S, B, H), False  # what the layer below hands over
    megatron_layer(t, x)
    symbols = {name: symbol(name) for name in ("b", "s", "a", "d")}
    b, s, a, d = symbols.values()
    h = a * d
    statistics = [one for one in saved(t) if one.size.dims == ("b", "s")]
    assert len(statistics) == 4
    total = sum(one.size.nbytes(symbols) for one in saved(t) if one not in statistics)
    assert sympy.expand(total - s * b * h * (34 + 5 * a * s / h)) == 0


def test_it_changes_with_the_ops():
    """The norm and the projection alone save their two inputs, 4 s b h: nothing else is counted in."""
    t = Trace(Regime(weights=BF16), Dimensions())
    x = t.parameter("x", *S, *B, *H)
    x.shape, x.storage.persistent = (S, B, H), False
    linear(t, "qkv", layer_norm(t, "ln_1", x), (3, *H))
    symbols = {name: symbol(name) for name in ("b", "s", "a", "d")}
    b, s, a, d = symbols.values()
    total = sum(one.size.nbytes(symbols) for one in saved(t) if one.size.dims != ("b", "s"))
    assert sympy.expand(total - 4 * s * b * a * d) == 0
