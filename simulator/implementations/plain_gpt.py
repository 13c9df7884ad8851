"""A GPT in plain PyTorch, with the layer of Megatron-LM: fused queries, keys and values, flash attention, biases.

Follows megatron/core/transformer/transformer_layer.py and attention.py (`SelfAttention`: the rows of the fused
projection are grouped by head), written with torch.nn modules; the loss is outside the model.
"""

from __future__ import annotations

from simulator import blocks, ops
from simulator.decoder import BuiltLayers, batch, cross_entropy_outside
from simulator.graph import Tensor
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Frame, Trace


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """Token ids to the loss; the table of learned positions has one row per token of the sequence."""
    ids, labels = batch(t)
    with t.call("") as local:
        vocabulary = blocks.vocabulary_table(t, "tok_embeddings")
        embeds = blocks.look_up(t, vocabulary, ids, "tok_embeddings")
        with t.call("pos"):
            table = t.matrix("weight", ("s",), ("h",))
        positions = ops.narrow(t, table, table.shape)  # a slice of all rows is still a slice to autograd
        hidden = local("x", ops.add(t, embeds, positions))
        for slot, layer in layers:
            with t.layer(slot, hidden):
                (x,) = blocks.layer_inputs(t, hidden)
                hidden = local("x", _block(t, x, layer, spec.residual_dropout))
        normed = blocks.layer_norm(t, "norm", hidden)
        logits = blocks.vocabulary_head(t, "output", normed, vocabulary if spec.tied_embeddings else None)
    cross_entropy_outside(t, logits, labels)
    t.order_layer_parameters("ln1", "ln2", "qkv", "proj", "fc1", "fc2")


def _block(t: Trace, x: Tensor, layer: LayerSpec, rate: float) -> Tensor:
    with t.call("layer", x) as local:
        attended = local("o", _attention(t, blocks.layer_norm(t, "ln1", x), local, layer.attention))
        hidden = local("x", ops.add(t, x, ops.dropout(t, attended, rate)))
        widened = local("y", _feed_forward(t, blocks.layer_norm(t, "ln2", hidden), layer.feed_forward))
        return ops.add(t, hidden, ops.dropout(t, widened, rate))


def _attention(t: Trace, x: Tensor, local: Frame, spec: AttentionSpec) -> Tensor:
    """One fused projection whose rows lie head by head: queries, keys and values of a head together."""
    heads, _, d = blocks.head_dims(t, spec)
    fused = blocks.projection(t, "qkv", x, (*heads, 3, d), bias=True)
    by_head = ops.reshape(t, fused, (*fused.shape[:-1], heads, (3, d)))
    parts = ops.split(t, by_head, (*fused.shape[:-1], heads, (d,)), 3)
    query, key, value = (local(name, part) for name, part in zip("qkv", parts, strict=True))
    out = local("o", blocks.causal_flash(t, query, key, value, spec))
    return blocks.projection(t, "proj", ops.reshape(t, out, (*out.shape[:-2], (*heads, d))), ("h",), bias=True)


def _feed_forward(t: Trace, x: Tensor, spec: FeedForwardSpec) -> Tensor:
    blocks.check_feed_forward(t, spec, blocks.GELU, bias=True)
    hidden = blocks.projection(t, "fc1", x, t.shard((t.dim("f", spec.width),)), bias=True)
    return blocks.projection(t, "fc2", ops.gelu(t, hidden), ("h",), bias=True)
