"""GPT-2 (Radford et al. 2019): learned positions, plain MLP with biases, dropout everywhere."""

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

# attribute_map of GPT2Config
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a GPT-2 config; defaults are those of GPT2Config in transformers 5.23.0."""
    config.refuse("add_cross_attention", (False, None), "set it to false")
    config.refuse("reorder_and_upcast_attn", (False, None), "set it to false")
    hidden = config.required_size("n_embd", 768, LARGEST_HIDDEN)
    layers = config.required_size("n_layer", 12, LARGEST_LAYERS)
    vocab = config.required_size("vocab_size", 50257, LARGEST_VOCAB)
    layer = LayerSpec(_attention(config, hidden), _feed_forward(config, hidden))
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=vocab,
        max_positions=config.size("n_positions", 1024, LARGEST_POSITIONS),
        layers=(layer,) * layers,
        tied_embeddings=config.flag("tie_word_embeddings", True),
        embedding_dropout=config.rate("embd_pdrop", 0.1),
        residual_dropout=config.rate("resid_pdrop", 0.1),
    )


def _attention(config: ConfigReader, hidden: int) -> AttentionSpec:
    heads = config.required_size("n_head", 12, LARGEST_HEADS)
    config.multiple("n_embd", "n_head", hidden, heads)
    dropout = config.rate("attn_pdrop", 0.1)
    return AttentionSpec(heads=heads, kv_heads=heads, head_dim=hidden // heads, bias=True, dropout=dropout)


def _feed_forward(config: ConfigReader, hidden: int) -> FeedForwardSpec:
    width = config.derived_size("n_inner", 4 * hidden, "4 * n_embd", LARGEST_WIDTH)
    activation = config.activation("activation_function", "gelu_new")
    return FeedForwardSpec(width=width, activation=activation, gated=False, bias=True)


families.add("gpt2", Family("gpt2", read, config_class="GPT2Config", aliases=_ALIASES))
