"""Falcon (Almazrouei et al., arXiv:2311.16867): one key/value head by broadcasting, attention and MLP side by side."""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator import blocks, decoder, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_even_heads, read_hidden
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.sizes import Dim
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Falcon config; defaults are those of FalconConfig in transformers 5.23.0."""
    config.refuse("alibi", (False, None), "set it to false")
    config.refuse("new_decoder_architecture", (False, None), "set it to false (Falcon-40B's layers are not modelled)")
    hidden = read_hidden(config, 4544)
    heads, head_dim = read_even_heads(config, hidden, 71)
    config.rotary(head_dim)
    bias = config.flag("bias", False)
    kv_heads = 1 if config.flag("multi_query", True) else heads
    config.refuse("attention_dropout", (0, 0.0, None), "set it to 0")
    width = config.derived_size("ffn_hidden_size", 4 * hidden, "4 * hidden_size", LARGEST_WIDTH)
    feed_forward = FeedForwardSpec(width, config.activation("activation", "gelu"), gated=False, bias=bias)
    layer = LayerSpec(AttentionSpec(heads, kv_heads, head_dim, bias=bias), feed_forward)
    dropout = config.rate("hidden_dropout", 0.0)
    layers = [layer] * read_depth(config)
    spec = read_decoder(config, hidden, layers, vocab=65024, tied=True, residual_dropout=dropout)
    return attrs.evolve(spec, parallel_blocks=config.flag("parallel_attn", True))


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`FalconForCausalLM` (transformers models/falcon/modeling_falcon.py)."""
    if t.regime.attention == "flash_attention_2":
        raise UnsupportedError("'attention' must be eager or sdpa with falcon: flash_attention_2 is not modelled")
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "transformer.word_embeddings")
    with t.call("transformer") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "word_embeddings"))
        position_ids = local("position_ids", decoder.positions(t, ids))
        mask = decoder.causal_mask(t, embeds, skip=False)
        assert mask is not None
        local("mask", mask)
        hidden = local("hidden", embeds)
        tables = blocks.rotary_tables(t, spec.layers[0].attention, embeds)
        for index, table in enumerate(tables):
            local(f"table.{index}", table)
        for slot, layer in layers:
            with t.layer(slot, hidden, mask, *tables, position_ids):
                hidden, weights = _layer(t, hidden, tables, mask, spec, layer)
                if weights is not None:
                    local("outputs", weights)  # the tuple that a layer returned lives until the next one returns
                local("hidden", hidden)
        hidden = local("hidden", blocks.layer_norm(t, "ln_f", hidden))
    decoder.language_head(t, hidden, labels, spec, vocabulary)
    t.order_layer_parameters("self_attention", "mlp", "post_attention_layernorm", "input_layernorm")


def _layer(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor, spec: ModelSpec, layer: LayerSpec
) -> tuple[Tensor, Tensor | None]:
    """`FalconDecoderLayer`: returns the weights of eager attention, too."""
    with t.call("layer", x) as local:
        normalised = local("attention_layernorm_out", blocks.layer_norm(t, "input_layernorm", x))
        attended, weights = _attention(t, normalised, tables, mask, layer.attention)
        local("attention_output", attended)
        if weights is not None:
            local("attn_weights", weights)
        residual = x
        if not spec.parallel_blocks:
            residual = local("residual", blocks.dropout_add(t, attended, x, 0.0))
            normalised = local("mlp_layernorm_out", blocks.layer_norm(t, "post_attention_layernorm", residual))
        mixed = local("mlp_output", _mlp(t, normalised, layer.feed_forward))
        if spec.parallel_blocks:
            mixed = local("mlp_output", ops.add_into(t, mixed, attended))
        return blocks.dropout_add(t, mixed, residual, spec.residual_dropout), weights


def _linear(t: Trace, name: str, x: Tensor, out: tuple[Dim, ...], bias: bool) -> Tensor:
    """`FalconLinear`: the bias is added by an op of its own."""
    with t.call(name, x) as local:
        product = local("hidden", ops.linear_by_matmul(t, x, t.matrix("weight", out, x.shape[-1]), out))
        return ops.add(t, product, t.vector("bias", out)) if bias else product


def _mlp(t: Trace, x: Tensor, spec: FeedForwardSpec) -> Tensor:
    """`FalconMLP`."""
    with t.call("mlp", x) as local:
        with t.call("") as inner:
            up = inner("up", _linear(t, "dense_h_to_4h", x, (t.dim("f", spec.width),), spec.bias))
            with t.call("act", up):
                active = local("x", blocks.activation(t, spec.activation, up))
        return _linear(t, "dense_4h_to_h", active, ("h",), spec.bias)


def _attention(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    """`FalconAttention`: keys and values of one head are broadcast by the matrix products."""
    heads = (t.dim("a", spec.heads),)
    d = t.dim("d", spec.head_dim)
    with t.call("self_attention", x) as local:
        states = _one_key(t, x, heads, d, spec) if spec.kv_heads < spec.heads else _key_per_head(t, x, heads, d, spec)
        query, key, value = (
            local(name, ops.transpose(t, part, 1, 2)) for name, part in zip("qkv", states, strict=True)
        )
        query, key = blocks.rotate(t, query, key, *tables)
        local("q", query)
        local("k", key)
        weights = None
        if t.regime.attention == "eager":
            out, weights = _eager(t, query, key, value, mask)
            local("weights", weights)
        else:
            out = ops.scaled_dot_product_attention(t, query, key, value, mask, 0.0, spec.head_dim, broadcast=True)
        out = local("out", out)
        out = local("out", ops.reshape(t, ops.transpose(t, out, 1, 2), (*x.shape[:-1], (*heads, d))))
        return _linear(t, "dense", out, ("h",), spec.bias), weights


def _one_key(t: Trace, x: Tensor, heads: tuple[Dim, ...], d: str, spec: AttentionSpec) -> list[Tensor]:
    """`_split_heads` with ``multi_query``: a slice of queries, copies of the one key and value."""
    rows = x.shape[:-1]
    joint = t.dim("a+2", spec.heads + 2)
    fused = _linear(t, "query_key_value", x, (joint, d), spec.bias)
    by_head = ops.view(t, fused, (*rows, (joint,), (d,)))
    query = ops.narrow(t, by_head, (*rows, heads, (d,)), axis=-2)
    return [query, *(ops.take_row(t, by_head, (*rows, (), (d,))) for _ in range(2))]


def _key_per_head(t: Trace, x: Tensor, heads: tuple[Dim, ...], d: str, spec: AttentionSpec) -> list[Tensor]:
    """`_split_heads` without ``multi_query``."""
    fused = _linear(t, "query_key_value", x, (*heads, 3, d), spec.bias)
    whole = ops.view(t, fused, (*x.shape[:-1], heads, (3,), (d,)))
    return [ops.select(t, whole, -2) for _ in range(3)]


def _eager(t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores are scaled in place; the softmax stays in the dtype of the hidden states."""
    with t.call("") as local:
        scores = local("scores", ops.matmul(t, query, ops.transpose(t, key, 2, 3)))
        scores = local("scores", ops.div_into(t, scores))
        with t.call("") as inner:
            masked = inner("masked", ops.add(t, scores, mask))
            scores = local("scores", ops.softmax(t, masked))
        return ops.matmul(t, scores, value), scores


families.add("falcon", Family("falcon", read, forward=forward, config_class="FalconConfig"))
