"""Falcon (Almazrouei et al., arXiv:2311.16867): one key/value head by broadcasting, attention and MLP side by side."""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator import blocks, decoder, masks, ops
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_even_heads, read_hidden
from simulator.families.early.falcon_attention import GroupedAttentionSpec, attention, linear
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HEADS, LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Falcon config; defaults are those of FalconConfig in transformers 5.23.0."""
    config.refuse("alibi", (False, None), "set it to false")
    hidden = read_hidden(config, 4544)
    heads, head_dim = read_even_heads(config, hidden, 71)
    config.rotary(head_dim)
    config.refuse("attention_dropout", (0, 0.0, None), "set it to 0")
    width = config.derived_size("ffn_hidden_size", 4 * hidden, "4 * hidden_size", LARGEST_WIDTH)
    bias = config.flag("bias", False)
    feed_forward = FeedForwardSpec(width, config.activation("activation", "gelu"), gated=False, bias=bias)
    layer = LayerSpec(_read_attention(config, heads, head_dim, bias=bias), feed_forward)
    dropout = config.rate("hidden_dropout", 0.0)
    layers = [layer] * read_depth(config)
    spec = read_decoder(config, hidden, layers, vocab=65024, tied=True, residual_dropout=dropout)
    return attrs.evolve(spec, parallel_blocks=config.flag("parallel_attn", True))


def _read_attention(config: ConfigReader, heads: int, head_dim: int, *, bias: bool) -> AttentionSpec:
    """One key/value head or as many as there are of queries; a number of them in the new architecture."""
    if not config.flag("new_decoder_architecture", False):
        return AttentionSpec(heads, 1 if config.flag("multi_query", True) else heads, head_dim, bias=bias)
    config.refuse("parallel_attn", (True, None), "set it to true with new_decoder_architecture")
    kv_heads = config.derived_size("num_kv_heads", heads, "num_attention_heads", LARGEST_HEADS)
    config.multiple("num_attention_heads", "num_kv_heads", heads, kv_heads)
    norms = config.optional_size("num_ln_in_parallel_attn", 2, 2) or 2
    return GroupedAttentionSpec(heads, kv_heads, head_dim, bias=bias, norms=norms)


def forward(t: Trace, spec: ModelSpec, layers: decoder.BuiltLayers) -> None:
    """`FalconForCausalLM` (transformers models/falcon/modeling_falcon.py)."""
    if t.regime.attention not in ("eager", "sdpa"):
        raise UnsupportedError(f"'attention' must be eager or sdpa with falcon: {t.regime.attention} is not modelled")
    ids, labels = decoder.batch(t)
    vocabulary = blocks.vocabulary_table(t, "transformer.word_embeddings")
    with t.call("transformer") as local:
        embeds = local("inputs_embeds", blocks.look_up(t, vocabulary, ids, "word_embeddings"))
        position_ids = local("position_ids", masks.positions(t, ids))
        mask = masks.causal_mask(t, embeds, skip=False)
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
    norms = ("post_attention_layernorm", "input_layernorm", "ln_attn", "ln_mlp")
    t.order_layer_parameters("self_attention", "mlp", *norms)


def _layer(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor, spec: ModelSpec, layer: LayerSpec
) -> tuple[Tensor, Tensor | None]:
    """`FalconDecoderLayer`: returns the weights of eager attention, too."""
    with t.call("layer", x) as local:
        two = isinstance(layer.attention, GroupedAttentionSpec) and layer.attention.norms == 2
        name = "ln_attn" if two else "input_layernorm"
        normalised = local("attention_layernorm_out", blocks.layer_norm(t, name, x))
        if two:
            local("mlp_layernorm_out", blocks.layer_norm(t, "ln_mlp", x))
        attended, weights = attention(t, normalised, tables, mask, layer.attention)
        local("attention_output", attended)
        if weights is not None:
            local("attn_weights", weights)
        residual = x
        if not spec.parallel_blocks:
            residual = local("residual", blocks.dropout_add(t, attended, x, 0.0))
            normalised = local("mlp_layernorm_out", blocks.layer_norm(t, "post_attention_layernorm", residual))
        normalised = local.held("mlp_layernorm_out") if two else normalised
        mixed = local("mlp_output", _mlp(t, normalised, layer.feed_forward))
        if spec.parallel_blocks:
            mixed = local("mlp_output", ops.add_into(t, mixed, attended))
        return blocks.dropout_add(t, mixed, residual, spec.residual_dropout), weights


def _mlp(t: Trace, x: Tensor, spec: FeedForwardSpec) -> Tensor:
    """`FalconMLP`."""
    with t.call("mlp", x) as local:
        with t.call("") as inner:
            up = inner("up", linear(t, "dense_h_to_4h", x, (t.dim("f", spec.width),), spec.bias))
            with t.call("act", up):
                active = local("x", blocks.activation(t, spec.activation, up))
        return linear(t, "dense_4h_to_h", active, ("h",), spec.bias)


families.add("falcon", Family("falcon", read, forward=forward, config_class="FalconConfig"))
