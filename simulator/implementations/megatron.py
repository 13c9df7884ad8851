"""Llama and GPT as Megatron-LM writes them: sequence first, fused projections, fused kernels, its own linear layers.

Follows megatron-core 0.16: megatron/core/models/gpt/gpt_model.py, transformer/transformer_layer.py, attention.py,
mlp.py, with the fusions on that are on by default and flash attention as core attention. Every linear layer is
`LinearWithGradAccumulationAndAsyncCommunication`; gradients are not fused into a main gradient. As ``megatron_te`` the
modules of layers are Transformer Engine's (megatron/core/extensions/transformer_engine.py): they save the same, gather
into tensors of their own, rotate in one kernel, and attention takes contiguous copies of what lies apart.
"""

from __future__ import annotations

from hardware.dtypes import FP32, INT64
from hardware.errors import UnsupportedError
from simulator import blocks, ops
from simulator.decoder import BuiltLayers, batch
from simulator.graph import Tensor
from simulator.implementations import megatron_mla, megatron_moe
from simulator.model import AttentionSpec, ExpertsSpec, FeedForwardSpec, LatentAttentionSpec, LayerSpec, ModelSpec
from simulator.ops import megatron, sharded_attention
from simulator.sizes import Dim, round_up
from simulator.tensor_parallel import AXIS
from simulator.trace import Trace

#: `make_vocab_size_divisible_by` of megatron/training/arguments.py, times the tensor-parallel degree.
VOCABULARY_MULTIPLE = 128


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`GPTModel.forward` with labels, and the mean over tokens of its caller."""
    if t.regime.autocast is not None:
        raise UnsupportedError("'autocast' must be left out with implementation 'megatron': it keeps 16-bit weights")
    sizes = t.dimensions.bindings
    rows = t.shard((t.dim("V_padded", round_up(sizes["V"], VOCABULARY_MULTIPLE * sizes["tp"])),))
    if t.sequence() != ("s",) and len(t.graph.stages) < 2:
        t.buffer("mpu", "s", "b", "h", dtype=t.regime.weights)  # `GlobalMemoryBuffer`, shared by all gathers
    megatron_moe.shared_buffers(t, spec.layers)
    freqs = _frequencies(t, spec) if _rotates(spec) else None
    with t.call("") as local:
        if t.stage.first or t.stage.last:
            ids, labels = batch(t)
            # made for every model (megatron/training/utils.py)
            positions = t.input("position_ids", "b", "s", dtype=INT64)
        table = None
        if t.stage.first:
            table, hidden = _embed(t, ids, positions, rows, spec)
        else:
            hidden = t.receive(*t.sequence(), "b", "h")
        local("decoder_input", hidden)
        with t.call("decoder") as decoder:
            for slot, layer in layers:
                with t.layer(slot, hidden, freqs):
                    hidden = decoder("hidden", _layer(t, hidden, freqs, layer, spec))
            hidden = _norm(t, "final_layernorm", hidden, spec) if t.stage.last else hidden
        local("hidden", hidden)
        if t.stage.last:
            tied = table if spec.tied_embeddings else None  # another stage's table is a weight of its own here
            loss = _head(t, hidden, tied, labels, rows)
    if t.stage.last:
        _mean(t, loss)
    else:
        t.send(hidden)
    attention = (*megatron_mla.ORDER, "linear_qkv")
    mlp = (*megatron_moe.ORDER, "linear_fc1", "linear_fc2")
    t.order_layer_parameters("input_layernorm", *attention, "pre_mlp_layernorm", *mlp)


def _head(t: Trace, hidden: Tensor, tied: Tensor | None, labels: Tensor, rows: tuple[Dim, ...]) -> Tensor:
    """`_postprocess`: logits and one loss per token."""
    with t.call("") as local, t.loss_head():
        with t.call("output_layer"):
            weight = t.matrix("weight", rows, ("h",)) if tied is None else tied
        logits = local("logits", megatron.fused_linear(t, hidden, weight, None, rows, _gathered(t)))
        return _token_losses(t, logits, labels)


def _mean(t: Trace, loss: Tensor) -> None:
    """The caller's loss function; a pipeline's loop keeps what it returns."""
    if t.regime.pipelined:
        t.leave_model()
    with t.loss_head():
        t.graph.loss = ops.mean_all(t, loss)
    t.graph.outputs = (t.graph.loss,) if t.regime.pipelined else ()


def _frequencies(t: Trace, spec: ModelSpec) -> Tensor:
    """`RotaryEmbedding.forward`: angles of shape ``[s, 1, 1, d]``, computed once and cached."""
    d = t.dim("d", spec.layers[0].attention.head_dim)
    t.buffer("rotary_pos_emb.inv_freq", t.dim("d/2", spec.layers[0].attention.head_dim // 2), dtype=FP32)
    freqs = t.buffer("rotary_pos_emb.freqs", "s", d, dtype=FP32)
    freqs.shape = t.squeezed((("s",), (), (), (d,)))
    return freqs


def _rotates(spec: ModelSpec) -> bool:
    """Whether the model makes rotary angles for all layers: latent attention makes its own."""
    return spec.family != "gpt2" and not isinstance(spec.layers[0].attention, LatentAttentionSpec)


def _gathered(t: Trace) -> tuple[Dim, ...] | None:
    """The whole sequence, where tensors are shards of it."""
    return None if t.sequence() == ("s",) else ("s",)


def _transformer_engine(t: Trace) -> bool:
    return t.regime.implementation == "megatron_te"


def _embed(t: Trace, ids: Tensor, positions: Tensor, rows: tuple[Dim, ...], spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """`LanguageModelEmbedding.forward`: the table and, sequence first, the hidden states."""
    with t.call("embedding") as local:
        with t.call("word_embeddings"):
            table = t.matrix("weight", rows, ("h",))
            sharded = t.regime.tensor_parallel is not None
            words = megatron.vocabulary_rows(t, table, ids) if sharded else ops.embedding(t, table, ids)
        shard, sequence = t.sequence(), _gathered(t) is not None
        if _rotates(spec) and sequence:
            with t.call("", words):
                first = _sequence_first(t, words)
            with t.call("", first):
                hidden = local("embeddings", megatron.scatter_partial(t, first, shard))
        else:
            local("word_embeddings", words)
            hidden = words
            if spec.family == "gpt2":
                places = local("position_embeddings", _positions(t, positions, spec))
                hidden = ops.add(t, words, places)
            with t.call("", hidden):
                hidden = local("embeddings", _sequence_first(t, hidden))
            if sequence:
                hidden = megatron.scatter_replicated(t, hidden, shard)
        if sequence:
            hidden = local("embeddings", ops.clone(t, hidden))
        return table, local("embeddings", ops.dropout(t, hidden, spec.embedding_dropout))


def _sequence_first(t: Trace, x: Tensor) -> Tensor:
    """``x.transpose(0, 1).contiguous()``: no copy of a batch of one."""
    return ops.contiguous(t, ops.transpose(t, x, 0, 1))


def _positions(t: Trace, ids: Tensor, spec: ModelSpec) -> Tensor:
    with t.call("position_embeddings"):
        table = t.matrix("weight", (t.dim("P", spec.max_positions),), ("h",))
        return ops.embedding(t, table, ids)


def _layer(t: Trace, x: Tensor, freqs: Tensor | None, layer: LayerSpec, spec: ModelSpec) -> Tensor:
    """`TransformerLayer`."""
    rate = spec.residual_dropout
    with t.call("layer", x) as local:
        normed = local("input_layernorm_output", _norm(t, "input_layernorm", x, spec))
        with t.call("") as branch:
            out, bias = _attention(t, normed, freqs, layer.attention)
            branch("attention_output", out)
            hidden = local("hidden_states", megatron.bias_dropout_add(t, out, bias, x, rate))
        normed = local("pre_mlp_layernorm_output", _norm(t, "pre_mlp_layernorm", hidden, spec))
        with t.call("") as branch:
            out, bias = _feed_forward(t, normed, layer.feed_forward, spec)
            branch("mlp_output", out)
            return megatron.bias_dropout_add(t, out, bias, hidden, rate)


def _norm(t: Trace, name: str, x: Tensor, spec: ModelSpec) -> Tensor:
    if spec.family == "gpt2":
        return blocks.layer_norm(t, name, x)
    with t.call(name, x):
        return ops.rms_norm(t, x, t.parameter("weight", *x.shape[-1]))


def _column(
    t: Trace, name: str, x: Tensor, out: tuple[Dim, ...], *, bias: bool, add: bool
) -> tuple[Tensor, Tensor | None]:
    """`ColumnParallelLinear`; its bias is added by the next kernel unless `add`."""
    with t.call(name):
        weight = t.matrix("weight", out, x.shape[-1])
        offset = t.vector("bias", out) if bias else None
        gathers = _transformer_engine(t)
        return megatron.fused_linear(t, x, weight, offset if add else None, out, _gathered(t), gathers=gathers), offset


def _row(t: Trace, name: str, x: Tensor, *, bias: bool) -> tuple[Tensor, Tensor | None]:
    """`RowParallelLinear` with `skip_bias_add`."""
    with t.call(name):
        weight = t.matrix("weight", ("h",), x.shape[-1])
        offset = t.vector("bias", ("h",)) if bias else None
        partial = megatron.fused_linear(t, x, weight, None, ("h",))
        if _gathered(t) is None:
            return partial, offset
        with t.call("", partial):
            return megatron.scatter_partial(t, partial, t.sequence()), offset


def _attention(t: Trace, x: Tensor, freqs: Tensor | None, spec: AttentionSpec) -> tuple[Tensor, Tensor | None]:
    """`SelfAttention`: queries of a group, its key and its value lie together in the fused projection."""
    if isinstance(spec, LatentAttentionSpec):
        return megatron_mla.latent_attention(t, x, spec), None
    with t.call("self_attention") as local:
        query, key, value = (local(n, part) for n, part in zip("qkv", _query_key_value(t, x, spec), strict=True))
        if freqs is not None:
            query, key = (local(name, _rope(t, part, freqs)) for name, part in (("query", query), ("key", key)))
        heads, d = query.shape[-2:]
        if _transformer_engine(t):  # `get_qkv_layout` of pytorch/attention/dot_product_attention/utils.py
            parts = {"query": query, "key": key, "v": value}
            query, key, value = (local(name, ops.contiguous(t, part)) for name, part in parts.items())
        out = _core_attention(t, query, key, value, spec)
        out = local("core_attn_out", ops.reshape(t, out, (*out.shape[:-2], heads + d)))
        return _row(t, "linear_proj", out, bias=spec.bias)


def _core_attention(t: Trace, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """Causal attention on ``[s, b, heads, d]``."""
    if t.regime.context_parallel is not None:
        return sharded_attention.attention(t, query, key, value)
    query, key, value = (ops.transpose(t, part, 0, 1) for part in (query, key, value))
    return ops.transpose(t, blocks.causal_flash(t, query, key, value, spec), 0, 1)


def _query_key_value(t: Trace, x: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """`get_query_key_value_tensors`: with more ranks than groups, all is gathered and each rank takes its heads."""
    shared = spec.kv_heads < t.dimensions.bindings[AXIS]
    d = t.dim("d", spec.head_dim)
    groups = () if spec.groups == 1 else (t.dim("g", spec.groups),)
    together = t.dim("g+2", spec.groups + 2)
    keys = (t.dim("k" if groups else "a", spec.kv_heads),)
    with t.call("") as local:
        rows = t.shard((*keys, together, d)) if shared else (*t.shard(keys), together, d)
        mixed, _ = _column(t, "linear_qkv", x, rows, bias=spec.bias, add=True)
        outer = mixed.shape[:-1]
        if shared:
            whole = megatron.gather_features(t, local("mixed_qkv", mixed), (*keys, together, d))
            own: tuple[Dim, ...] = ()
            by_group = megatron.part(t, whole, (*outer, own, (together, d)))
        else:
            own = t.shard(keys)
            by_group = ops.reshape(t, mixed, (*outer, own, (together, d)))
        shapes = [(*outer, own, (*groups, d)), (*outer, own, (d,)), (*outer, own, (d,))]
        query, key, value = ops.split_with_sizes(t, by_group, shapes)
        query = _heads_apart(t, query, (*outer, (*own, *groups), (d,)))
        if shared:
            query = megatron.part(t, query, (*outer, t.shard((t.dim("a", spec.heads),)), (d,)))
        return query, key, value


def _heads_apart(t: Trace, query: Tensor, shape: tuple[tuple[Dim, ...], ...]) -> Tensor:
    """``query.reshape(s, b, -1, d)``: a copy where several groups of several heads lie apart."""
    shape = t.squeezed(shape)
    if query.shape == shape:
        return query
    several = len(shape[-2]) > 1
    return ops.view(t, ops.clone(t, query) if several else query, shape)


def _rope(t: Trace, x: Tensor, freqs: Tensor) -> Tensor:
    """`_apply_rotary_pos_emb_bshd`: cosines and sines are made at every call; an empty rest is joined in a copy."""
    if _transformer_engine(t):
        return megatron.fused_rope(t, x, freqs)
    with t.call("", x) as local:
        rest = local("t_pass", ops.narrow(t, x, x.shape))
        cos, sin = (local(name, _table(t, name, freqs, x)) for name in ("cos", "sin"))
        with t.call("") as stack:
            direct = stack("direct", ops.mul(t, x, cos))
            with t.call("") as half:
                d = x.shape[-1][0]
                shape = (*x.shape[:-1], (t.dim(f"{d}/2", t.dimensions.bindings[str(d)] // 2),))
                first, second = (half(n, p) for n, p in zip(("x1", "x2"), ops.split(t, x, shape, 2), strict=True))
                rotated = ops.cat(t, [ops.neg(t, second), first], x.shape, x.memory)
            turned = stack("turned", ops.mul(t, rotated, sin))
            whole = local("t", ops.add(t, direct, turned))
        return ops.cat(t, [whole, rest], x.shape, x.memory)


def _table(t: Trace, name: str, freqs: Tensor, like: Tensor) -> Tensor:
    with t.call("") as local:
        with t.call("") as inner:
            scaled = ops.constant(t, "mul.Tensor", inner(name, ops.constant(t, f"{name}.default", freqs)))
        return ops.to(t, local("scaled", scaled), like.dtype)


def _feed_forward(t: Trace, x: Tensor, spec: FeedForwardSpec, model: ModelSpec) -> tuple[Tensor, Tensor | None]:
    if not isinstance(spec, ExpertsSpec):
        return _mlp(t, x, spec)
    return megatron_moe.mixture(t, x, spec, model.family, lambda *shared: _mlp(*shared)[0]), None


def _mlp(t: Trace, x: Tensor, spec: FeedForwardSpec, name: str = "mlp") -> tuple[Tensor, Tensor | None]:
    """`MLP`: gate and up are one projection."""
    blocks.check_feed_forward(t, spec, blocks.SILU if spec.gated else blocks.GELU, bias=not spec.gated)
    width = t.shard((t.dim("f" if name == "mlp" else "f_shared", spec.width),))
    with t.call(name) as local:
        fused, bias = _column(t, "linear_fc1", x, (2, *width) if spec.gated else width, bias=spec.bias, add=False)
        with t.call("", fused):
            active = megatron.swiglu(t, fused, width) if bias is None else megatron.bias_gelu(t, fused, bias)
        return _row(t, "linear_fc2", local("intermediate", active), bias=spec.bias)


def _token_losses(t: Trace, logits: Tensor, labels: Tensor) -> Tensor:
    """`compute_language_model_loss`: one loss per token, batch first."""
    with t.call("") as local:
        kernel = megatron.fused_cross_entropy if t.regime.loss == "te_fused" else megatron.vocabulary_cross_entropy
        loss = local("loss", kernel(t, logits, local("labels", _sequence_first(t, labels))))
        return _sequence_first(t, loss)
