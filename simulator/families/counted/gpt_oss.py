"""gpt-oss (arXiv:2508.10925): attention sinks, biases everywhere, experts with biases."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.counted.decoder import counted_decoder
from simulator.families.counting import linear
from simulator.families.decoder import read_attention, read_depth, read_hidden
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_EXPERTS, LARGEST_WIDTH
from simulator.model import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """The parts of such a config; defaults are those of GptOssConfig in transformers 5.23.0."""
    hidden = read_hidden(config, 2880)
    bias = config.flag("attention_bias", True)
    spec = read_attention(config, hidden, heads=64, kv_heads=8, head_dim=64, even=False)
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = linear(hidden, query, bias=bias) + 2 * linear(hidden, key, bias=bias) + linear(query, hidden, bias=bias)
    width = config.required_size("intermediate_size", 2880, LARGEST_WIDTH)
    count = config.required_size("num_local_experts", 128, LARGEST_EXPERTS)
    expert = linear(hidden, 2 * width, bias=True) + linear(width, hidden, bias=True)
    layer = attention + spec.heads + count * expert + linear(hidden, count, bias=True) + 2 * hidden
    depth = read_depth(config, 36)
    return counted_decoder(config, config, hidden, [layer] * depth, vocab=201088, positions=131072)


families.add("gpt_oss", Family("gpt_oss", read, config_class="GptOssConfig"))
