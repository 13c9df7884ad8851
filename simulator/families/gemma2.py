"""Gemma 2 (arXiv:2408.00118): alternating sliding and full attention, soft caps, tied embeddings."""

from __future__ import annotations

import attrs

from simulator import blocks, ops
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import (
    LARGEST_HEADS,
    LARGEST_HIDDEN,
    LARGEST_LAYERS,
    LARGEST_POSITIONS,
    LARGEST_VOCAB,
    LARGEST_WIDTH,
)
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

SLIDING = "sliding_attention"
FULL = "full_attention"


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Gemma 2 config; defaults are those of Gemma2Config in transformers 5.23.0."""
    config.refuse("use_bidirectional_attention", (False, None), "set it to false")
    hidden = config.required_size("hidden_size", 2304, LARGEST_HIDDEN)
    vocab = config.required_size("vocab_size", 256000, LARGEST_VOCAB)
    windows = _windows(config)
    attention = _read_attention(config, hidden)
    feed_forward = _read_feed_forward(config)
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=vocab,
        max_positions=config.size("max_position_embeddings", 8192, LARGEST_POSITIONS),
        layers=tuple(LayerSpec(attrs.evolve(attention, window=each), feed_forward) for each in windows),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        final_softcap=config.softcap("final_logit_softcapping", 30.0),
    )


def _windows(config: ConfigReader) -> list[int | None]:
    layers = config.required_size("num_hidden_layers", 26, LARGEST_LAYERS)
    alternating = [FULL if index % 2 else SLIDING for index in range(layers)]
    kinds = config.names("layer_types", alternating, (SLIDING, FULL), f"{SLIDING} and {FULL} in turn")
    window = config.optional_size("sliding_window", 4096, LARGEST_POSITIONS)
    no_window = f"sliding_window is null but layer_types has {SLIDING}: give a length in tokens"
    config.check(window is not None or SLIDING not in kinds, no_window, "sliding_window", "layer_types")
    return [window if kind == SLIDING else None for kind in kinds]


def _read_attention(config: ConfigReader, hidden: int) -> AttentionSpec:
    heads = config.required_size("num_attention_heads", 8, LARGEST_HEADS)
    config.multiple("hidden_size", "num_attention_heads", hidden, heads)
    kv_heads = config.size("num_key_value_heads", 4, LARGEST_HEADS)
    config.multiple("num_attention_heads", "num_key_value_heads", heads, kv_heads)
    head_dim = config.size("head_dim", 256, LARGEST_HIDDEN)
    config.rotary(head_dim)
    return AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        bias=config.flag("attention_bias", False),
        dropout=config.rate("attention_dropout", 0.0),
        softcap=config.softcap("attn_logit_softcapping", 50.0),
    )


def _read_feed_forward(config: ConfigReader) -> FeedForwardSpec:
    width = config.required_size("intermediate_size", 9216, LARGEST_WIDTH)
    return FeedForwardSpec(width=width, activation=config.activation("hidden_activation", "gelu_pytorch_tanh"))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Gemma2ForCausalLM` (transformers models/gemma2/modeling_gemma2.py): scaled embeddings, a mask per layer kind."""
    rotary_decoder(t, spec, layers, embed=_embed, layer=_layer, norm=blocks.gemma_rms_norm, windows=True)
    before, after = "input_layernorm", "post_attention_layernorm"
    t.order_layer_parameters(
        "self_attn", "mlp", before, after, "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )


def _embed(t: Trace, vocabulary: Tensor, ids: Tensor) -> Tensor:
    """`Gemma2TextScaledWordEmbedding`."""
    embeds = blocks.look_up(t, vocabulary, ids, "embed_tokens")
    with t.call("embed_tokens"):
        return ops.mul(t, embeds, t.buffer("embed_scale", dtype=t.regime.weights))


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`Gemma2DecoderLayer`: norms before and after both halves."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.gemma_rms_norm(t, "input_layernorm", x))
        hidden, weights = blocks.rotary_attention(t, hidden, tables, mask, layer.attention)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        hidden = local("hidden", blocks.gemma_rms_norm(t, "post_attention_layernorm", hidden))
        residual = local("residual", local("hidden", ops.add(t, x, hidden)))
        hidden = local("hidden", blocks.gemma_rms_norm(t, "pre_feedforward_layernorm", residual))
        hidden = local("hidden", blocks.gated_mlp(t, hidden, layer.feed_forward))
        hidden = local("hidden", blocks.gemma_rms_norm(t, "post_feedforward_layernorm", hidden))
        return ops.add(t, residual, hidden)


families.add("gemma2", Family("gemma2", read, forward=forward, config_class="Gemma2Config"))
