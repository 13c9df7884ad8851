"""Gemma 4: sliding and full layers of different head sizes, keys that are values, a dense MLP beside experts."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.counted.decoder import counted_decoder
from simulator.families.counting import experts, gated_mlp, linear
from simulator.families.decoder import FULL, SLIDING, read_depth, read_hidden
from simulator.families.reader import ConfigReader
from simulator.families.towers import gemma4_vision, vision_parts
from simulator.limits import LARGEST_EXPERTS, LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_WIDTH
from simulator.model import ModelSpec

_PATTERN = 6
"""Every sixth layer sees the whole sequence (Gemma4TextConfig)."""


def read(config: ConfigReader) -> ModelSpec:
    """The parts of a Gemma 4 config; defaults are those of Gemma4TextConfig in transformers 5.23.0."""
    text = config.section("text_config", "Gemma4TextConfig")
    hidden = read_hidden(text, 2304)
    layers = _layers(text, hidden, read_depth(text, 30))
    parts = vision_parts(config, hidden, "Gemma4VisionConfig", gemma4_vision)
    return counted_decoder(config, text, hidden, layers, vocab=262144, positions=131072, tied=True, parts=parts)


def _layers(config: ConfigReader, hidden: int, depth: int) -> list[int]:
    for key, harmless in (("hidden_size_per_layer_input", 0), ("num_kv_shared_layers", 0)):
        config.refuse(key, (harmless, None), f"set it to {harmless}")
    config.refuse("use_double_wide_mlp", (False, None), "set it to false")
    pattern = [FULL if (index + 1) % _PATTERN == 0 or index + 1 == depth else SLIDING for index in range(depth)]
    kinds = config.names("layer_types", pattern, (SLIDING, FULL), f"every {_PATTERN}th layer is {FULL}")
    heads = config.required_size("num_attention_heads", 8, LARGEST_HEADS)
    kv_heads = config.size("num_key_value_heads", 4, LARGEST_HEADS)
    sliding = _attention(hidden, heads, kv_heads, config.size("head_dim", 256, LARGEST_HIDDEN), pairs=2)
    shared = config.flag("attention_k_eq_v", False)
    global_heads = config.derived_size("num_global_key_value_heads", kv_heads, "num_key_value_heads", LARGEST_HEADS)
    global_dim = config.size("global_head_dim", 512, LARGEST_HIDDEN)
    full = _attention(hidden, heads, global_heads if shared else kv_heads, global_dim, pairs=1 if shared else 2)
    each = _channel_mixer(config, hidden)
    return [(full if kind == FULL else sliding) + each for kind in kinds]


def _attention(hidden: int, heads: int, kv_heads: int, head_dim: int, *, pairs: int) -> int:
    """Query and output projections, `pairs` of keys and values, norms of queries and keys."""
    return 2 * linear(hidden, heads * head_dim) + pairs * linear(hidden, kv_heads * head_dim) + 2 * head_dim


def _channel_mixer(config: ConfigReader, hidden: int) -> int:
    """The MLP with the four norms of a layer, and the experts beside it with three more and their scales."""
    dense = gated_mlp(hidden, config.required_size("intermediate_size", 9216, LARGEST_WIDTH)) + 4 * hidden
    if not config.flag("enable_moe_block", False):
        return dense
    count = config.required_size("num_experts", 128, LARGEST_EXPERTS)
    width = config.required_size("moe_intermediate_size", 704, LARGEST_WIDTH)
    scales = hidden + count
    return dense + experts(hidden, width, count) + scales + 3 * hidden


families.add("gemma4", Family("gemma4", read, config_class="Gemma4Config"))
