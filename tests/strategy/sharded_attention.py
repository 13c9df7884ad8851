"""A model that is one attention over sharded sequences, as it was recorded: ``(attention(2q, 2k, 2v) * 2).mean()``."""

from __future__ import annotations

from simulator import ops
from simulator.model import ModelSpec
from simulator.ops import sharded_attention
from simulator.trace import Trace


def forward(t: Trace, spec: ModelSpec, layers: object) -> None:
    """Transformer Engine's functions have the sequence first; torch's have views with heads before it."""
    attention, torch = spec.layers[0].attention, t.regime.implementation == "transformers"
    first = ("b", "s") if torch else ("s", "b")
    heads = (attention.heads, attention.kv_heads, attention.kv_heads)
    shapes = ((*first, t.dim(name, n), t.dim("d", attention.head_dim)) for name, n in zip("akk", heads, strict=True))
    states = [t.parameter(name, *shape) for name, shape in zip("qkv", shapes, strict=True)]
    with t.call("") as local:
        doubled = [local(x.storage.label, ops.mul_scalar(t, x)) for x in states]
        with t.call("", *doubled):
            if torch:
                out = ops.ring_attention(t, *(ops.transpose(t, x, 1, 2) for x in doubled))
            else:
                out = sharded_attention.attention(t, *doubled)
    with t.call("", out):
        out = ops.mul_scalar(t, out)
    with t.call("", out):
        t.graph.loss = ops.mean_all(t, out)
    t.graph.outputs = ()
