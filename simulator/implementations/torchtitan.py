"""Llama as torchtitan writes it: fused norms, rotary positions in fp32, loss outside the model.

Follows torchtitan/models/llama3/model/model.py (commit b5bcd76c6) with real-valued rotary tables, the form that
compiles: which intermediate has a Python name, and so lives until its function returns, is part of what is modelled.
"""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator import blocks, ops
from simulator.decoder import BuiltLayers, batch, cross_entropy_outside
from simulator.graph import Tensor
from simulator.model import AttentionSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

_FEED_FORWARD = ("feed_forward", "w1", "w3", "w2")


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Transformer.forward`, and the loss of its trainer."""
    ids, labels = batch(t)
    with t.call("") as local:
        vocabulary = blocks.vocabulary_table(t, "tok_embeddings") if t.stage.first else None
        hidden = local("x", blocks.look_up(t, vocabulary, ids, "tok_embeddings") if vocabulary else t.receive())
        tables = _rotary_tables(t, spec.layers[0].attention.head_dim)
        for slot, layer in layers:
            with t.layer(slot, hidden, *tables):
                x, cos, sin = blocks.layer_inputs(t, hidden, *tables)
                hidden = local("x", _block(t, x, cos, sin, layer))
        if t.stage.last:
            normed = _norm(t, "norm", hidden)
            logits = blocks.vocabulary_head(t, "output", normed, vocabulary if spec.tied_embeddings else None)
    if t.stage.last:
        cross_entropy_outside(t, logits, labels)
    else:
        t.send(hidden)
    t.order_layer_parameters("attention", "feed_forward", "attention_norm", "ffn_norm")


def _rotary_tables(t: Trace, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of shape ``[s, 1, d/2]``, fp32 buffers of the model."""
    half = t.dim("d/2", head_dim // 2)
    cos, sin = (t.buffer(name, "s", half, dtype=FP32) for name in ("cos", "sin"))
    for table in (cos, sin):
        table.shape = t.squeezed((("s",), (), (half,)))
    return cos, sin


def _block(t: Trace, x: Tensor, cos: Tensor, sin: Tensor, layer: LayerSpec) -> Tensor:
    """`TransformerBlock`."""
    with t.call("layer", x, cos, sin) as local:
        normed = _norm(t, "attention_norm", x)
        hidden = local("x", ops.add(t, x, _attention(t, normed, cos, sin, layer.attention)))
        normed = _norm(t, "ffn_norm", hidden)
        return ops.add(t, hidden, blocks.gated_mlp(t, normed, layer.feed_forward, _FEED_FORWARD))


def _norm(t: Trace, name: str, x: Tensor) -> Tensor:
    with t.call(name, x):
        return ops.rms_norm(t, x, t.parameter("weight", *x.shape[-1]))


def _attention(t: Trace, x: Tensor, cos: Tensor, sin: Tensor, spec: AttentionSpec) -> Tensor:
    """`Attention`: heads stay token-major until the kernel is called."""
    heads, key_heads, d = blocks.head_dims(t, spec)
    with t.call("attention", x) as local:
        x = local("x", blocks.module_input(t, "attention", x))
        states = []
        for name, own in (("wq", heads), ("wk", key_heads), ("wv", key_heads)):
            projected = blocks.projection(t, name, x, (*own, d), spec.bias)
            states.append(local(name, ops.reshape(t, projected, (*projected.shape[:-1], own, (d,)))))
        query, key, value = states
        rotated = [_rope(t, states, cos, sin) for states in (query, key)]
        query, key = (local(name, states) for name, states in zip(("wq", "wk"), rotated, strict=True))
        out = blocks.causal_flash(t, query, key, value, spec)
        out = local("out", ops.reshape(t, out, (*out.shape[:-2], (*heads, d))))
        return blocks.projection(t, "wo", out, ("h",), spec.bias)


def _rope(t: Trace, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head in fp32: ``(a cos - b sin, a sin + b cos)``."""
    with t.call("", x) as local:
        upcast = ops.to(t, x, FP32)
        half = (*x.shape[:-1], cos.shape[-1])
        a, b = (local(name, part) for name, part in zip("ab", ops.split(t, upcast, half, 2), strict=True))
        with t.call("") as stack:
            first = stack("first", ops.sub(t, ops.mul(t, a, cos), ops.mul(t, b, sin)))
            second = stack("second", ops.add(t, ops.mul(t, a, sin), ops.mul(t, b, cos)))
            rotated = ops.cat(t, [first, second], x.shape, x.memory)
        return ops.to(t, rotated, x.dtype)
