"""Llama 4: every token through one of many experts and a shared one, in every layer or in every second."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.counted.decoder import counted_decoder
from simulator.families.counting import experts, gated_mlp, linear
from simulator.families.decoder import read_attention, read_depth, read_hidden
from simulator.families.reader import ConfigReader
from simulator.families.towers import llama4_vision, vision_parts
from simulator.limits import LARGEST_EXPERTS, LARGEST_LAYERS, LARGEST_WIDTH
from simulator.model import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """The parts of such a config; defaults are those of Llama4TextConfig in transformers 5.23.0."""
    text = config.section("text_config", "Llama4TextConfig")
    hidden = read_hidden(text, 5120)
    text.refuse("attention_bias", (False, None), "set it to false")
    spec = read_attention(text, hidden, heads=40, kv_heads=8, head_dim=128, even=False)
    query, key = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    attention = 2 * linear(hidden, query) + 2 * linear(hidden, key) + 2 * hidden
    width = text.required_size("intermediate_size", 8192, LARGEST_WIDTH)
    count = text.required_size("num_local_experts", 16, LARGEST_EXPERTS)
    sparse = attention + experts(hidden, width, count) + gated_mlp(hidden, width)
    dense = attention + gated_mlp(hidden, text.size("intermediate_size_mlp", 16384, LARGEST_WIDTH))
    step = text.size("interleave_moe_layer_step", 1, LARGEST_LAYERS)
    layers = [dense if (index + 1) % step else sparse for index in range(read_depth(text, 48))]
    parts = vision_parts(config, hidden, "Llama4VisionConfig", llama4_vision)
    return counted_decoder(config, text, hidden, layers, vocab=202048, positions=4096 * 32, parts=parts)


families.add("llama4", Family("llama4", read, config_class="Llama4Config"))
