"""Llama (Touvron et al., arXiv:2302.13971): RMSNorm, rotary positions, gated MLP, grouped queries."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.reader import ConfigReader
from simulator.limits import (
    LARGEST_HEADS,
    LARGEST_HIDDEN,
    LARGEST_LAYERS,
    LARGEST_POSITIONS,
    LARGEST_VOCAB,
    LARGEST_WIDTH,
)
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Llama config; defaults are those of LlamaConfig in transformers 5.23.0."""
    config.refuse("pretraining_tp", (None, 1), "set it to 1")
    hidden = config.required_size("hidden_size", 4096, LARGEST_HIDDEN)
    layers = config.required_size("num_hidden_layers", 32, LARGEST_LAYERS)
    vocab = config.required_size("vocab_size", 32000, LARGEST_VOCAB)
    layer = LayerSpec(_attention(config, hidden), _feed_forward(config))
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=vocab,
        max_positions=config.size("max_position_embeddings", 2048, LARGEST_POSITIONS),
        layers=(layer,) * layers,
        tied_embeddings=config.flag("tie_word_embeddings", False),
    )


def _attention(config: ConfigReader, hidden: int) -> AttentionSpec:
    heads = config.required_size("num_attention_heads", 32, LARGEST_HEADS)
    config.multiple("hidden_size", "num_attention_heads", hidden, heads)
    kv_heads = config.derived_size("num_key_value_heads", heads, "num_attention_heads", LARGEST_HEADS)
    config.multiple("num_attention_heads", "num_key_value_heads", heads, kv_heads)
    head_dim = config.derived_size("head_dim", hidden // heads, "hidden_size // num_attention_heads", LARGEST_HIDDEN)
    config.rotary(head_dim)
    bias = config.flag("attention_bias", False)
    dropout = config.rate("attention_dropout", 0.0)
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, dropout=dropout)


def _feed_forward(config: ConfigReader) -> FeedForwardSpec:
    width = config.required_size("intermediate_size", 11008, LARGEST_WIDTH)
    activation = config.activation("hidden_act", "silu")
    return FeedForwardSpec(width=width, activation=activation, bias=config.flag("mlp_bias", False))


families.add("llama", Family("llama", read, config_class="LlamaConfig"))
