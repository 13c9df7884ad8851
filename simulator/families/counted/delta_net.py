"""Qwen3-Next and Qwen3.5: gated delta nets (arXiv:2412.06464) with full attention in every fourth layer."""

from __future__ import annotations

from collections.abc import Callable

from simulator.families import Family, families
from simulator.families.counted.decoder import counted_decoder
from simulator.families.counting import experts, gated_mlp, linear
from simulator.families.decoder import FULL, read_attention, read_depth, read_hidden
from simulator.families.reader import ConfigReader
from simulator.families.towers import qwen3_vision, vision_parts
from simulator.limits import LARGEST_EXPERTS, LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_LAYERS, LARGEST_WIDTH
from simulator.model import ModelSpec

LINEAR = "linear_attention"


def _read_wrapped(config: ConfigReader, text_class: str, mixer: Callable[[ConfigReader, int], int]) -> ModelSpec:
    text = config.section("text_config", text_class)
    hidden = read_hidden(text, 4096)
    parts = vision_parts(config, hidden, text_class.replace("Text", "Vision"), qwen3_vision)
    layers = _layers(text, hidden, mixer)
    return counted_decoder(config, text, hidden, layers, vocab=248320, positions=32768, parts=parts)


def read_dense(config: ConfigReader) -> ModelSpec:
    """The parts of a Qwen3.5 config; defaults are those of Qwen3_5TextConfig in transformers 5.23.0."""
    return _read_wrapped(config, "Qwen3_5TextConfig", _mlp)


def read_sparse(config: ConfigReader) -> ModelSpec:
    """The parts of a Qwen3.5 config with experts; defaults are those of Qwen3_5MoeTextConfig."""
    return _read_wrapped(config, "Qwen3_5MoeTextConfig", _experts)


def _layers(config: ConfigReader, hidden: int, mixer: Callable[[ConfigReader, int], int]) -> list[int]:
    config.refuse("mlp_only_layers", ([], None), "remove it")
    config.refuse("decoder_sparse_step", (1, None), "set it to 1")
    config.refuse("attention_bias", (False, None), "set it to false")
    depth = read_depth(config, 48)
    interval = config.size("full_attention_interval", 4, LARGEST_LAYERS)
    pattern = [FULL if (index + 1) % interval == 0 else LINEAR for index in range(depth)]
    kinds = config.names("layer_types", pattern, (FULL, LINEAR), "each full_attention_interval-th sees all tokens")
    each = {FULL: _attention(config, hidden), LINEAR: _delta_net(config, hidden)}
    rest = mixer(config, hidden) + 2 * hidden
    return [each[kind] + rest for kind in kinds]


def _attention(config: ConfigReader, hidden: int) -> int:
    """Queries with an output gate beside them, keys, values, norms of queries and keys."""
    spec = read_attention(config, hidden, heads=16, kv_heads=2, head_dim=256, even=False)
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return 3 * linear(hidden, query) + 2 * linear(hidden, key) + 2 * spec.head_dim


def _delta_net(config: ConfigReader, hidden: int) -> int:
    """`Qwen3NextGatedDeltaNet`: queries, keys, values, gates; two numbers per value head; a short convolution."""
    values = config.size("linear_num_value_heads", 32, LARGEST_HEADS)
    dim = config.size("linear_value_head_dim", 128, LARGEST_HIDDEN)
    keys = config.size("linear_num_key_heads", 16, LARGEST_HEADS)
    key = keys * config.size("linear_key_head_dim", 128, LARGEST_HIDDEN)
    value = values * dim
    channels = 2 * key + value
    kernel = config.size("linear_conv_kernel_dim", 4, LARGEST_HIDDEN)
    inputs = linear(hidden, channels + value + 2 * values)
    return inputs + channels * kernel + 2 * values + dim + linear(value, hidden)


def _mlp(config: ConfigReader, hidden: int) -> int:
    return gated_mlp(hidden, config.required_size("intermediate_size", 12288, LARGEST_WIDTH))


def _experts(config: ConfigReader, hidden: int) -> int:
    """Routed experts, and a shared one behind a gate."""
    count = config.required_size("num_experts", 512, LARGEST_EXPERTS)
    width = config.required_size("moe_intermediate_size", 512, LARGEST_WIDTH)
    shared = config.size("shared_expert_intermediate_size", 512, LARGEST_WIDTH)
    return experts(hidden, width, count) + gated_mlp(hidden, shared) + linear(hidden, 1)


for _name, _class, _read in (
    ("qwen3_5", "Qwen3_5Config", read_dense),
    ("qwen3_5_moe", "Qwen3_5MoeConfig", read_sparse),
):
    families.add(_name, Family(_name, _read, config_class=_class))
