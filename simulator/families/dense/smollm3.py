"""SmolLM3 (Hugging Face, 2025): Llama of which each fourth layer has no rotary positions."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers, full_and_own_windows, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import (
    FULL,
    SLIDING,
    read_attention,
    read_decoder,
    read_depth,
    read_gated,
    read_hidden,
    read_windows,
)
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_LAYERS, LARGEST_POSITIONS
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a SmolLM3 config; defaults are those of SmolLM3Config in transformers 5.23.0."""
    hidden = read_hidden(config, 2048)
    bias = config.flag("attention_bias", False)
    attention = read_attention(config, hidden, heads=16, kv_heads=4, bias=bias, even=False, null_kv_heads=True)
    feed_forward = read_gated(config, width=11008, bias=config.flag("mlp_bias", False))
    depth = read_depth(config, 36)
    interval = config.size("no_rope_layer_interval", 4, LARGEST_LAYERS)
    every = [(index + 1) % interval != 0 for index in range(depth)]
    rotary = config.flags("no_rope_layers", every, "each no_rope_layer_interval-th is 0")
    layers = [
        LayerSpec(attrs.evolve(attention, window=window, rotary=rotates), feed_forward)
        for window, rotates in zip(_windows(config, rotary), rotary, strict=True)
    ]
    return read_decoder(config, hidden, layers, vocab=128256, positions=32768, tied=True)


def _windows(config: ConfigReader, rotary: list[bool]) -> list[int | None]:
    """Layers without rotary positions slide, where ``use_sliding_window`` is set."""
    used = config.flag("use_sliding_window", False)
    length = config.optional_size("sliding_window", None, LARGEST_POSITIONS) if used else None
    kinds = [SLIDING if length is not None and not rotates else FULL for rotates in rotary]
    return read_windows(config, len(rotary), window=length, kinds=kinds, rule="the layers without rotary positions")


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`SmolLM3ForCausalLM` (transformers models/smollm3/modeling_smollm3.py)."""
    norm = blocks.llama_rms_norm
    layer = partial(blocks.decoder_layer, norm=norm)
    rotary_decoder(t, spec, layers, layer=layer, norm=norm, windows=full_and_own_windows(spec))
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


families.add("smollm3", Family("smollm3", read, forward=forward, config_class="SmolLM3Config"))
