"""What the configurations of GPT-2 and GPT-BigCode share."""

from __future__ import annotations

from simulator.families.decoder import read_even_heads
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_HIDDEN, LARGEST_LAYERS, LARGEST_POSITIONS, LARGEST_VOCAB, LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""attribute_map of GPT2Config and of GPTBigCodeConfig."""


def read_gpt(config: ConfigReader, *, activation: str, shares_key: bool = False) -> ModelSpec:
    """The spec of such a config; defaults are those of both classes in transformers 5.23.0.

    Args:
        config: the configuration.
        activation: default of ``activation_function``.
        shares_key: whether all queries have one key and one value.
    """
    config.refuse("add_cross_attention", (False, None), "set it to false")
    hidden = config.required_size("n_embd", 768, LARGEST_HIDDEN)
    heads, head_dim = read_even_heads(config, hidden, 12, key="n_head", of="n_embd")
    kv_heads, dropout = 1 if shares_key else heads, config.rate("attn_pdrop", 0.1)
    width = config.derived_size("n_inner", 4 * hidden, "4 * n_embd", LARGEST_WIDTH)
    feed_forward = FeedForwardSpec(width, config.activation("activation_function", activation), gated=False, bias=True)
    layer = LayerSpec(AttentionSpec(heads, kv_heads, head_dim, bias=True, dropout=dropout), feed_forward)
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=config.required_size("vocab_size", 50257, LARGEST_VOCAB),
        max_positions=config.size("n_positions", 1024, LARGEST_POSITIONS),
        layers=(layer,) * config.required_size("n_layer", 12, LARGEST_LAYERS),
        tied_embeddings=config.flag("tie_word_embeddings", True),
        embedding_dropout=config.rate("embd_pdrop", 0.1),
        residual_dropout=config.rate("resid_pdrop", 0.1),
    )
