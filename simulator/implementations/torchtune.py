"""Llama as torchtune writes it: RMSNorm in fp32, rotary tables looked up by position, keys and values expanded.

Follows torchtune at 1814feb17: torchtune/modules/transformer.py `TransformerDecoder`, attention.py
`MultiHeadAttention`, feed_forward.py, rms_norm.py, position_embeddings.py; the loss is the trainer's
(recipes/full_finetune_single_device.py `_loss_step`). With ``flex_attention`` sequences are packed: positions come
with the batch and rotary tables are gathered at every call.
"""

from __future__ import annotations

from hardware.dtypes import FP32, INT64
from hardware.errors import UnsupportedError
from simulator import blocks, ops
from simulator.decoder import BuiltLayers, batch, set_loss
from simulator.graph import Tensor, flat
from simulator.model import AttentionSpec, LayerSpec, ModelSpec
from simulator.sizes import Dim
from simulator.trace import Trace

PACKED = "flex_attention"
_FEED_FORWARD = ("mlp", "w1", "w3", "w2")
_MODULES = ("attn", "mlp", "sa_norm", "mlp_norm")
#: `num_output_chunks` of torchtune/modules/loss/ce_chunked_output_loss.py.
CHUNKS = 8


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`TransformerDecoder.forward`, and the loss of the recipe."""
    ids, labels = batch(t)
    positions = t.input("input_pos", "b", "s", dtype=INT64) if t.regime.attention == PACKED else None
    with t.call("") as local:
        vocabulary = blocks.vocabulary_table(t, "tok_embeddings")
        hidden = local("h", blocks.look_up(t, vocabulary, ids, "tok_embeddings"))
        cache = _rotary_cache(t, spec)
        for slot, layer in layers:
            with t.layer(slot, hidden, positions):
                hidden = local("h", _layer(t, hidden, cache, positions, layer))
        hidden = local("h", _norm(t, "norm", hidden))
        tied = vocabulary if spec.tied_embeddings else None
        if t.regime.loss != "default":
            with t.loss_head():
                chunks = _chunked_logits(t, hidden, tied)
                for number, chunk in enumerate(chunks):
                    local(f"output{number}", chunk)
                _chunked_loss(t, chunks, labels)
            t.order_layer_parameters(*_MODULES)
            return
        logits = blocks.vocabulary_head(t, "output", hidden, tied)
        with t.loss_head():
            logits = local("output", ops.to(t, logits, FP32))
    _loss(t, logits, labels)
    t.order_layer_parameters(*_MODULES)


def _loss(t: Trace, logits: Tensor, labels: Tensor) -> None:
    """`_loss_step`: labels are shifted in a copy; the logits are dropped before backward."""
    t.leave_model()
    with t.loss_head(), t.call("loss", logits) as local:
        shifted = local("labels", ops.constant(t, "cat.default", labels))
        flat = ops.reshape(t, logits, (("b", "s"), logits.shape[-1]))
        set_loss(t, ops.nll_loss(t, ops.log_softmax(t, flat), shifted))
    t.graph.outputs = ()


def _chunked_logits(t: Trace, hidden: Tensor, tied: Tensor | None) -> list[Tensor]:
    """`chunked_output`: the head on one part of the sequence after the other, in the model's element type."""
    rows, last = hidden.shape[0], hidden.shape[-1]
    parts = ops.split_with_sizes(t, hidden, [t.squeezed((rows, (dim,), last)) for dim in _parts(t)])
    weight = t.matrix("output.weight", ("V",), ("h",)) if tied is None else tied
    logits = []
    with t.call("output"):
        for part in parts:
            part.dense = rows == ()  # parts of several rows lie apart: `linear` flattens a copy
            logits.append(ops.linear(t, part if part.dense else ops.clone(t, part), weight))
    return logits


def _parts(t: Trace) -> list[Dim]:
    """Names of the lengths that ``chunk`` cuts the sequence into: all alike but for the last."""
    length = t.dimensions.bindings["s"]
    step = -(-length // CHUNKS)
    count = -(-length // step)
    rest = length - step * (count - 1)
    return [*[t.dim("s_chunk", step)] * (count - 1), t.dim("s_chunk" if rest == step else "s_last", rest)]


def _chunked_loss(t: Trace, logits: list[Tensor], labels: Tensor) -> None:
    """`CEWithChunkedOutputLoss`: the sum of the chunks' losses over the number of labels."""
    t.leave_model()
    with t.call("loss") as local:
        shifted = local("labels", ops.constant(t, "cat.default", labels))
        local("total_elements", ops.constant(t, "sum.default", shifted, shape=()))
        targets = [
            local(f"labels{i}", ops.constant(t, "clone.default", shifted, shape=(flat(chunk.shape[:-1]),)))
            for i, chunk in enumerate(logits)
        ]
        total = None
        for chunk, target in zip(logits, targets, strict=True):
            loss = _cross_entropy(t, ops.reshape(t, chunk, (flat(chunk.shape[:-1]), chunk.shape[-1])), target)
            total = local("total_loss", loss if total is None else ops.add(t, total, loss))
        assert total is not None
        set_loss(t, ops.div_scalar(t, total))
    t.graph.outputs = ()


def _cross_entropy(t: Trace, logits: Tensor, targets: Tensor) -> Tensor:
    if t.regime.loss == "chunked_compiled":
        return ops.compiled_cross_entropy(t, logits, targets)
    with t.call("", logits):
        return ops.nll_loss(t, ops.log_softmax(t, ops.to(t, logits, FP32)), targets)


def _rotary_cache(t: Trace, spec: ModelSpec) -> Tensor:
    """Cosine and sine of every position, side by side, in fp32: one buffer that all layers share."""
    head_dim = spec.layers[0].attention.head_dim
    d, half = t.dim("d", head_dim), t.dim("d/2", head_dim // 2)
    t.buffer("rope.theta", half, dtype=FP32)
    return t.buffer("rope.cache", t.dim("P", spec.max_positions), d, dtype=FP32)


def _layer(t: Trace, x: Tensor, cache: Tensor, positions: Tensor | None, layer: LayerSpec) -> Tensor:
    """`TransformerSelfAttentionLayer`."""
    with t.call("layer", x) as local:
        h = local("h", _norm(t, "sa_norm", x))
        attended = local("attn_out", _attention(t, h, cache, positions, layer.attention))
        h = local("h", ops.add(t, attended, x))
        blocks.check_feed_forward(t, layer.feed_forward, blocks.SILU, bias=False)
        out = local("mlp_out", blocks.gated_mlp(t, _norm(t, "mlp_norm", h), layer.feed_forward, _FEED_FORWARD))
        return local("out", ops.add(t, h, out))


def _norm(t: Trace, name: str, x: Tensor) -> Tensor:
    with t.call(name, x) as local:
        scale = t.parameter("scale", *x.shape[-1])
        wide = local("x_fp32", ops.to(t, x, FP32))
        factor = ops.rsqrt(t, ops.add_scalar(t, ops.mean(t, ops.power(t, wide))))
        normed = local("x_normed", ops.to(t, ops.mul(t, wide, factor), x.dtype))
        return ops.mul(t, normed, scale)


def _attention(t: Trace, x: Tensor, cache: Tensor, positions: Tensor | None, spec: AttentionSpec) -> Tensor:
    """`MultiHeadAttention`: keys and values are copied for every query of their group before the kernel."""
    heads, key_heads, d = blocks.head_dims(t, spec)
    with t.call("attn", x) as local:
        query = local("q", _states(t, "q_proj", x, (*heads, d), spec))
        query = local("q", _rope(t, query, cache, positions))
        query = local("q", ops.transpose(t, query, 1, 2))
        key = local("k", _states(t, "k_proj", x, (*key_heads, d), spec))
        value = local("v", _states(t, "v_proj", x, (*key_heads, d), spec))
        key = local("k", _rope(t, key, cache, positions))
        key, value = (local(n, ops.transpose(t, each, 1, 2)) for n, each in (("k", key), ("v", value)))
        key, value = (local(n, blocks.repeat_kv(t, each, query.shape[1])) for n, each in (("k", key), ("v", value)))
        out = local("output", _kernel(t, query, key, value, spec))
        out = ops.contiguous(t, ops.transpose(t, out, 1, 2))
        out = local("output", ops.reshape(t, out, (*out.shape[:-2], (*heads, d))))
        return blocks.projection(t, "output_proj", out, ("h",), spec.bias)


def _states(t: Trace, name: str, x: Tensor, out: tuple[Dim, ...], spec: AttentionSpec) -> Tensor:
    states = blocks.projection(t, name, x, out, spec.bias)
    return ops.reshape(t, states, (*x.shape[:-1], out[:-1], out[-1:]))


def _kernel(t: Trace, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    if t.regime.attention == PACKED:
        return ops.flex_attention(t, query, key, value)
    for field, only in (("attention", "sdpa"), ("attention_mask", "none")):
        if getattr(t.regime, field) != only:
            raise UnsupportedError(f"{field!r} must be {only} or flex_attention with implementation 'torchtune'")
    return ops.scaled_dot_product_attention(t, query, key, value, None, spec.dropout, spec.head_dim)


def _rope(t: Trace, x: Tensor, cache: Tensor, positions: Tensor | None) -> Tensor:
    """`RotaryPositionalEmbeddings`: pairs that lie side by side are rotated in fp32."""
    with t.call("pos_embeddings", x) as local:
        table = local("rope_cache", _table(t, x, cache, positions))
        wide = local("xshaped", ops.to(t, x, FP32))
        half = t.dim("d/2", t.dimensions.bindings["d"] // 2)
        cos, sin = (ops.narrow(t, table, (*table.shape[:-1], (half,))) for _ in range(2))
        with t.call("") as stack:
            pairs: list[Tensor] = []
            for combine in (ops.sub, ops.add):
                parts = (ops.mul(t, ops.narrow(t, wide, (*x.shape[:-1], (half,))), table) for table in (cos, sin))
                left, right = parts
                pairs.append(stack(f"pair{len(pairs)}", combine(t, left, right)))
            rotated = local("x_out", ops.cat(t, pairs, x.shape, x.memory))
        return ops.to(t, rotated, x.dtype)


def _table(t: Trace, x: Tensor, cache: Tensor, positions: Tensor | None) -> Tensor:
    """One row per token where sequences are packed, else the first rows of the cache."""
    d = x.shape[-1]
    if positions is None:
        table = t.view(cache, (("s",), (), d), ("s", *d))
        t.emit("slice.Tensor", [cache], [table])
        return table
    return ops.constant(t, "index.Tensor", cache, shape=(*x.shape[:2], (), d))
