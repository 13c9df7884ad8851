"""What GPT-2 and GPT-BigCode share: their configurations and the residual stream of a layer."""

from __future__ import annotations

from collections.abc import Callable

from simulator import blocks, ops
from simulator.families.decoder import read_even_heads
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HIDDEN, LARGEST_LAYERS, LARGEST_POSITIONS, LARGEST_VOCAB, LARGEST_WIDTH
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

#: Hidden states and mask to the output of attention, and its weights where it has some.
Attend = Callable[[Trace, Tensor, "Tensor | None", ModelSpec, AttentionSpec], "tuple[Tensor, Tensor | None]"]
#: Hidden states through the MLP.
Mlp = Callable[[Trace, Tensor, ModelSpec, FeedForwardSpec], Tensor]

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


def gpt_block(
    t: Trace, x: Tensor, mask: Tensor | None, spec: ModelSpec, layer: LayerSpec, attend: Attend, mlp: Mlp
) -> Tensor:
    """`GPT2Block` (models/gpt2/modeling_gpt2.py), `GPTBigCodeBlock` (models/gpt_bigcode/modeling_gpt_bigcode.py)."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.layer_norm(t, "ln_1", x))
        attended, weights = attend(t, hidden, mask, spec, layer.attention)
        local("attn_output", attended)
        if weights is not None:
            local("_", weights)
        residual = local("residual", local("hidden", ops.add(t, attended, x)))
        hidden = local("hidden", blocks.layer_norm(t, "ln_2", residual))
        return ops.add(t, residual, local("mlp", mlp(t, hidden, spec, layer.feed_forward)))
