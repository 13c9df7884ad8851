"""Llama (Touvron et al., arXiv:2302.13971): RMSNorm, rotary positions, gated MLP, grouped queries."""

from __future__ import annotations

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


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Llama config; defaults are those of LlamaConfig in transformers 5.23.0."""
    config.refuse("pretraining_tp", (None, 1), "set it to 1")
    hidden = config.required_size("hidden_size", 4096, LARGEST_HIDDEN)
    layers = config.required_size("num_hidden_layers", 32, LARGEST_LAYERS)
    vocab = config.required_size("vocab_size", 32000, LARGEST_VOCAB)
    layer = LayerSpec(_read_attention(config, hidden), _read_feed_forward(config))
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=vocab,
        max_positions=config.size("max_position_embeddings", 2048, LARGEST_POSITIONS),
        layers=(layer,) * layers,
        tied_embeddings=config.flag("tie_word_embeddings", False),
    )


def _read_attention(config: ConfigReader, hidden: int) -> AttentionSpec:
    heads = config.required_size("num_attention_heads", 32, LARGEST_HEADS)
    config.multiple("hidden_size", "num_attention_heads", hidden, heads)
    kv_heads = config.derived_size("num_key_value_heads", heads, "num_attention_heads", LARGEST_HEADS)
    config.multiple("num_attention_heads", "num_key_value_heads", heads, kv_heads)
    head_dim = config.derived_size("head_dim", hidden // heads, "hidden_size // num_attention_heads", LARGEST_HIDDEN)
    config.rotary(head_dim)
    bias = config.flag("attention_bias", False)
    dropout = config.rate("attention_dropout", 0.0)
    return AttentionSpec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, bias=bias, dropout=dropout)


def _read_feed_forward(config: ConfigReader) -> FeedForwardSpec:
    width = config.required_size("intermediate_size", 11008, LARGEST_WIDTH)
    activation = config.activation("hidden_act", "silu")
    return FeedForwardSpec(width=width, activation=activation, bias=config.flag("mlp_bias", False))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`LlamaForCausalLM` (transformers models/llama/modeling_llama.py)."""
    rotary_decoder(t, spec, layers, embed=_embed, layer=_layer, norm=blocks.llama_rms_norm)
    t.order_layer_parameters("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def _embed(t: Trace, vocabulary: Tensor, ids: Tensor) -> Tensor:
    return blocks.look_up(t, vocabulary, ids, "embed_tokens")


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`LlamaDecoderLayer`."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.llama_rms_norm(t, "input_layernorm", x))
        hidden, weights = blocks.rotary_attention(t, hidden, tables, mask, layer.attention)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        residual = local("residual", local("hidden", ops.add(t, x, hidden)))
        hidden = local("hidden", blocks.llama_rms_norm(t, "post_attention_layernorm", residual))
        hidden = local("hidden", blocks.gated_mlp(t, hidden, layer.feed_forward))
        return ops.add(t, residual, hidden)


_OTHERS = {
    "torchtitan": "simulator.implementations.torchtitan",
    "torchtune": "simulator.implementations.torchtune",
    "megatron": "simulator.implementations.megatron",
    "megatron_te": "simulator.implementations.megatron",
}
families.add("llama", Family("llama", read, forward=forward, config_class="LlamaConfig", implementations=_OTHERS))
