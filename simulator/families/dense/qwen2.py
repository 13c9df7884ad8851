"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers, full_and_own_windows, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import (
    read_attention,
    read_decoder,
    read_depth,
    read_gated,
    read_hidden,
    read_late_windows,
)
from simulator.families.reader import ConfigReader
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Qwen2 config; defaults are those of Qwen2Config in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_attention(config, hidden, kv_heads=32, bias=True, even=False, null_kv_heads=True)
    attention = attrs.evolve(attention, output_bias=False)
    feed_forward = read_gated(config, width=22016)
    windows = read_late_windows(config, read_depth(config))
    layers = [LayerSpec(attrs.evolve(attention, window=each), feed_forward) for each in windows]
    return read_decoder(config, hidden, layers, vocab=151936, positions=32768)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Qwen2ForCausalLM` (transformers models/qwen2/modeling_qwen2.py)."""
    norm = blocks.llama_rms_norm
    layer = partial(blocks.decoder_layer, norm=norm)
    rotary_decoder(t, spec, layers, layer=layer, norm=norm, windows=full_and_own_windows(spec))
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


families.add("qwen2", Family("qwen2", read, forward=forward, config_class="Qwen2Config"))
