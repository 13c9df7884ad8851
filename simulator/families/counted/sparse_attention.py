"""DeepSeek-V3.2 (arXiv:2512.02556) and GLM-5: latent attention with a lightning indexer, experts."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.counting import experts, gated_mlp, layer_norm, linear
from simulator.families.decoder import read_depth, read_hidden
from simulator.families.reader import ConfigReader
from simulator.limits import (
    LARGEST_EXPERTS,
    LARGEST_HEADS,
    LARGEST_HIDDEN,
    LARGEST_LAYERS,
    LARGEST_POSITIONS,
    LARGEST_VOCAB,
    LARGEST_WIDTH,
)
from simulator.model import LayerSpec, ModelSpec, Part


def read(config: ConfigReader) -> ModelSpec:
    """The parts of such a config; defaults are those of DeepseekV32Config in transformers 5.23.0."""
    hidden = read_hidden(config, 7168)
    depth = read_depth(config, 61)
    vocab = config.required_size("vocab_size", 129280, LARGEST_VOCAB)
    tied = config.flag("tie_word_embeddings", False)
    layers = depth * (_attention(config, hidden) + _indexer(config, hidden) + 2 * hidden)
    total = vocab * hidden * (1 if tied else 2) + hidden + layers + _channel_mixers(config, hidden, depth)
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=vocab,
        max_positions=config.size("max_position_embeddings", 163840, LARGEST_POSITIONS),
        layers=(LayerSpec(None, None),) * depth,
        tied_embeddings=tied,
        parts=(Part("text", total),),
    )


def _attention(config: ConfigReader, hidden: int) -> int:
    """`DeepseekV3Attention`: low-rank queries, keys and values."""
    config.refuse("attention_bias", (False, None), "set it to false")
    heads = config.required_size("num_attention_heads", 128, LARGEST_HEADS)
    query, latent = (config.size(key, size, LARGEST_HIDDEN) for key, size in _RANKS)
    nope = config.size("qk_nope_head_dim", 128, LARGEST_HIDDEN)
    rotary = config.size("qk_rope_head_dim", 64, LARGEST_HIDDEN)
    value = config.size("v_head_dim", 128, LARGEST_HIDDEN)
    queries = linear(hidden, query) + query + linear(query, heads * (nope + rotary))
    keys = linear(hidden, latent + rotary) + latent + linear(latent, heads * (nope + value))
    return queries + keys + linear(heads * value, hidden)


_RANKS = (("q_lora_rank", 1536), ("kv_lora_rank", 512))


def _indexer(config: ConfigReader, hidden: int) -> int:
    """`DeepseekV32Indexer`: what chooses the keys that a query sees."""
    heads = config.size("index_n_heads", 64, LARGEST_HEADS)
    head_dim = config.size("index_head_dim", 128, LARGEST_HIDDEN)
    rank = config.size("q_lora_rank", 1536, LARGEST_HIDDEN)
    return linear(rank, heads * head_dim) + linear(hidden, head_dim) + layer_norm(head_dim) + linear(hidden, heads)


def _channel_mixers(config: ConfigReader, hidden: int, depth: int) -> int:
    """Dense layers first, then routed and shared experts."""
    dense = min(depth, config.count("first_k_dense_replace", 3, LARGEST_LAYERS))
    width = config.required_size("moe_intermediate_size", 2048, LARGEST_WIDTH)
    count = config.required_size("n_routed_experts", 256, LARGEST_EXPERTS)
    shared = width * config.size("n_shared_experts", 1, LARGEST_EXPERTS)
    mlp = gated_mlp(hidden, config.required_size("intermediate_size", 18432, LARGEST_WIDTH))
    return dense * mlp + (depth - dense) * (experts(hidden, width, count) + gated_mlp(hidden, shared))


families.add("deepseek_v32", Family("deepseek_v32", read, config_class="DeepseekV32Config"))
families.add("glm_moe_dsa", Family("glm_moe_dsa", read, config_class="GlmMoeDsaConfig"))
