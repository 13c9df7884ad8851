"""DeepSeek-V4: one shared key/value head, compressed sparse attention, hyper-connections, experts."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.counted.decoder import counted_decoder
from simulator.families.counting import experts, gated_mlp, linear
from simulator.families.decoder import read_depth, read_hidden
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_EXPERTS, LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_WIDTH
from simulator.model import ModelSpec

_SPARSE, _HEAVY = 4, 128
"""Tokens that one compressed entry stands for: 0 for none (configuration_deepseek_v4.py)."""


def read(config: ConfigReader) -> ModelSpec:
    """The parts of such a config; defaults are those of DeepseekV4Config in transformers 5.23.0."""
    hidden = read_hidden(config, 4096)
    streams = config.size("hc_mult", 4, LARGEST_HEADS)
    each = _layer(config, hidden, streams)
    layers = [each + more for more in _compressors(config, hidden, read_depth(config, 43))]
    head = _connection(streams, hidden, streams, 1)
    return counted_decoder(config, config, hidden, layers, vocab=129280, positions=1048576, others=head)


def _connection(streams: int, hidden: int, outputs: int, scales: int) -> int:
    """A hyper-connection: from all streams to `outputs` mixing weights, with a base and scales."""
    return linear(streams * hidden, outputs) + outputs + scales


def _layer(config: ConfigReader, hidden: int, streams: int) -> int:
    """What every layer has: attention, experts, two norms, two hyper-connections (pre, post and residual mixing)."""
    mixing = _connection(streams, hidden, streams * (2 + streams), 3)
    width = config.required_size("moe_intermediate_size", 2048, LARGEST_WIDTH)
    count = config.required_size("n_routed_experts", 256, LARGEST_EXPERTS)
    shared = width * config.size("n_shared_experts", 1, LARGEST_EXPERTS)
    mixer = experts(hidden, width, count) + gated_mlp(hidden, shared)
    return _attention(config, hidden) + mixer + 2 * hidden + 2 * mixing


def _attention(config: ConfigReader, hidden: int) -> int:
    """`DeepseekV4Attention`: low-rank queries, one key that is the value, sinks, a grouped low-rank output."""
    config.refuse("attention_bias", (False, None), "set it to false")
    heads = config.required_size("num_attention_heads", 64, LARGEST_HEADS)
    head_dim = config.size("head_dim", 512, LARGEST_HIDDEN)
    rank = config.size("q_lora_rank", 1024, LARGEST_HIDDEN)
    groups = config.size("o_groups", 8, LARGEST_HEADS)
    inner = groups * config.size("o_lora_rank", 1024, LARGEST_HIDDEN)
    queries = linear(hidden, rank) + rank + linear(rank, heads * head_dim)
    outputs = linear(heads * head_dim // groups, inner) + linear(inner, hidden)
    return queries + linear(hidden, head_dim) + head_dim + outputs + heads


def _compressors(config: ConfigReader, hidden: int, depth: int) -> list[int]:
    """What each layer has besides to see compressed keys, by its ratio."""
    default = [_HEAVY] * min(depth, 2) + [_SPARSE if index % 2 else _HEAVY for index in range(depth - 2)]
    ratios = config.choices("compress_ratios", default, (0, _SPARSE, _HEAVY), depth)
    head_dim = config.size("head_dim", 512, LARGEST_HIDDEN)
    sparse = _compressor(hidden, head_dim, _SPARSE, 2) + _indexer(config, hidden)
    each = {0: 0, _SPARSE: sparse, _HEAVY: _compressor(hidden, head_dim, _HEAVY, 1)}
    return [each[ratio] for ratio in ratios]


def _compressor(hidden: int, head_dim: int, ratio: int, overlap: int) -> int:
    """Keys and gates of `overlap` windows, a bias per position in the window, and a norm."""
    return 2 * linear(hidden, overlap * head_dim) + ratio * overlap * head_dim + head_dim


def _indexer(config: ConfigReader, hidden: int) -> int:
    heads = config.size("index_n_heads", 64, LARGEST_HEADS)
    head_dim = config.size("index_head_dim", 128, LARGEST_HIDDEN)
    rank = config.size("q_lora_rank", 1024, LARGEST_HIDDEN)
    return _compressor(hidden, head_dim, _SPARSE, 2) + linear(rank, heads * head_dim) + linear(hidden, heads)


families.add("deepseek_v4", Family("deepseek_v4", read, config_class="DeepseekV4Config"))
