"""DeepSeek-V3.2 (arXiv:2512.02556) and GLM-5: latent attention with a lightning indexer, experts."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.counted.decoder import counted_decoder
from simulator.families.counting import experts, gated_mlp, layer_norm, linear
from simulator.families.decoder import read_depth, read_gated, read_hidden
from simulator.families.experts.latent import read_latent_attention
from simulator.families.experts.reading import read_routed
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_LAYERS
from simulator.model import LatentAttentionSpec, ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """The parts of such a config; defaults are those of DeepseekV32Config in transformers 5.23.0."""
    config.refuse("attention_bias", (False, None), "set it to false")
    hidden = read_hidden(config, 7168)
    depth = read_depth(config, 61)
    attention = read_latent_attention(config, heads=128, query_rank=1536, interleaved=True)
    dense = gated_mlp(hidden, read_gated(config, width=18432).width)
    routed = read_routed(config, width=2048, experts=256, per_token=8, shared=1, normalised=True)
    sparse = experts(hidden, routed.width, routed.experts) + gated_mlp(hidden, routed.shared.width)
    rest = _attention(attention, hidden) + _indexer(config, attention, hidden) + 2 * hidden
    first = min(depth, config.count("first_k_dense_replace", 3, LARGEST_LAYERS))
    layers = [dense + rest] * first + [sparse + rest] * (depth - first)
    return counted_decoder(config, config, hidden, layers, vocab=129280, positions=163840)


def _attention(spec: LatentAttentionSpec, hidden: int) -> int:
    """`DeepseekV3Attention`: low-rank queries, keys and values."""
    rank = spec.query_rank or 0
    queries = linear(hidden, rank) + rank + linear(rank or hidden, spec.heads * spec.head_dim)
    keys = linear(hidden, spec.latent + spec.rotated) + spec.latent
    expanded = linear(spec.latent, spec.heads * (spec.plain_dim + spec.value_dim))
    return queries + keys + expanded + linear(spec.heads * spec.value_dim, hidden)


def _indexer(config: ConfigReader, spec: LatentAttentionSpec, hidden: int) -> int:
    """`DeepseekV32Indexer`: what chooses the keys that a query sees."""
    heads = config.size("index_n_heads", 64, LARGEST_HEADS)
    head_dim = config.size("index_head_dim", 128, LARGEST_HIDDEN)
    inputs = linear(spec.query_rank or hidden, heads * head_dim)
    return inputs + linear(hidden, head_dim) + layer_norm(head_dim) + linear(hidden, heads)


families.add("deepseek_v32", Family("deepseek_v32", read, config_class="DeepseekV32Config"))
families.add("glm_moe_dsa", Family("glm_moe_dsa", read, config_class="GlmMoeDsaConfig"))
