"""The parts of multimodal checkpoints beside the language model: counted, not simulated.

Each follows one modeling file of transformers 5.23 (named per function). A wrapper's config without a
``vision_config`` describes a text model, and counts as one.
"""

from __future__ import annotations

from collections.abc import Callable

from simulator.families.counting import encoder_layer, gated_mlp, layer_norm, linear
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_HIDDEN, LARGEST_LAYERS, LARGEST_POSITIONS, LARGEST_WIDTH
from simulator.model import Part

#: Parameters of a tower and its projector, from its section and the channels of the language model.
Count = Callable[[ConfigReader, int], int]


def vision_parts(config: ConfigReader, hidden: int, config_class: str, count: Count) -> tuple[Part, ...]:
    """What the wrapper `config` holds beside a language model of `hidden` channels."""
    config.refuse("audio_config", (None,), "remove it: audio towers are not counted")
    if not config.given("vision_config"):
        return ()
    return (Part("vision", count(config.section("vision_config", config_class), hidden)),)


def _width(config: ConfigReader, default: int) -> int:
    return config.size("hidden_size", default, LARGEST_HIDDEN)


def _depth(config: ConfigReader, default: int, key: str = "num_hidden_layers") -> int:
    return config.size(key, default, LARGEST_LAYERS)


def _ffn(config: ConfigReader, default: int) -> int:
    return config.size("intermediate_size", default, LARGEST_WIDTH)


def _pixels(config: ConfigReader, patch: int) -> int:
    """Values in one patch."""
    return config.size("num_channels", 3, LARGEST_HIDDEN) * config.size("patch_size", patch, LARGEST_HIDDEN) ** 2


def _patches(config: ConfigReader, image: int, patch: int) -> int:
    side = config.size("image_size", image, LARGEST_POSITIONS) // config.size("patch_size", patch, LARGEST_HIDDEN)
    return side * side


def siglip(config: ConfigReader, hidden: int) -> int:
    """`SiglipVisionModel` without its pooling head, and Gemma 3's projector (models/siglip, models/gemma3)."""
    config.refuse("vision_use_head", (False,), "set it to false")
    width, ffn = _width(config, 768), _ffn(config, 3072)
    embeddings = linear(_pixels(config, 16), width, bias=True) + _patches(config, 224, 16) * width
    layers = _depth(config, 12) * encoder_layer(width, ffn)
    projector = linear(width, hidden) + width
    return embeddings + layers + layer_norm(width) + projector


def llama4_vision(config: ConfigReader, hidden: int) -> int:
    """`Llama4VisionModel` and `Llama4MultiModalProjector` (models/llama4/modeling_llama4.py)."""
    width, ffn = _width(config, 768), _ffn(config, 5632)
    embeddings = linear(_pixels(config, 14), width) + (2 + _patches(config, 448, 14)) * width
    layers = _depth(config, 34) * encoder_layer(width, ffn) + 2 * layer_norm(width)
    inner = config.size("projector_input_dim", 4096, LARGEST_WIDTH)
    adapter = linear(ffn, inner) + linear(inner, config.size("projector_output_dim", 4096, LARGEST_WIDTH))
    projector = linear(config.size("vision_output_dim", 7680, LARGEST_WIDTH), hidden)
    return embeddings + layers + adapter + projector


def qwen3_vision(config: ConfigReader, hidden: int) -> int:
    """`Qwen3_5VisionModel` (models/qwen3_5/modeling_qwen3_5.py): 3-D patches, learned positions, a merger."""
    config.refuse("deepstack_visual_indexes", ([], None), "remove it")
    width, ffn = _width(config, 1152), _ffn(config, 4304)
    frames = config.size("temporal_patch_size", 2, LARGEST_HIDDEN)
    positions = config.size("num_position_embeddings", 2304, LARGEST_POSITIONS)
    embeddings = linear(frames * _pixels(config, 16), width, bias=True) + positions * width
    layers = _depth(config, 27, "depth") * encoder_layer(width, ffn)
    merged = width * config.size("spatial_merge_size", 2, LARGEST_HIDDEN) ** 2
    out = config.size("out_hidden_size", hidden, LARGEST_HIDDEN)
    merger = layer_norm(width) + linear(merged, merged, bias=True) + linear(merged, out, bias=True)
    return embeddings + layers + merger


def gemma4_vision(config: ConfigReader, hidden: int) -> int:
    """`Gemma4VisionModel` and its embedder (models/gemma4/modeling_gemma4.py): gated MLPs, 2-D position tables."""
    width, ffn = _width(config, 768), _ffn(config, 3072)
    heads = config.size("num_attention_heads", 12, LARGEST_HIDDEN)
    head_dim = config.size("head_dim", 64, LARGEST_HIDDEN)
    key_width = head_dim * config.size("num_key_value_heads", 12, LARGEST_HIDDEN)
    positions = 2 * config.size("position_embedding_size", 10240, LARGEST_POSITIONS) * width
    attention = 2 * linear(width, heads * head_dim) + 2 * linear(width, key_width) + 2 * head_dim
    layers = _depth(config, 16) * (attention + gated_mlp(width, ffn) + 4 * width)
    return positions + linear(_pixels(config, 16), width) + layers + linear(width, hidden)
