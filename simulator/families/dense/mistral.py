"""Mistral (Jiang et al., arXiv:2310.06825): Llama without biases and with a sliding window in every layer."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import (
    read_attention,
    read_decoder,
    read_depth,
    read_gated,
    read_hidden,
)
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_POSITIONS
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Mistral config; defaults are those of MistralConfig in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_attention(config, hidden, kv_heads=8, even=False, null_kv_heads=True)
    attention = attrs.evolve(attention, window=config.optional_size("sliding_window", 4096, LARGEST_POSITIONS))
    layers = [LayerSpec(attention, read_gated(config, width=14336))] * read_depth(config)
    return read_decoder(config, hidden, layers, positions=131072)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`MistralForCausalLM` (transformers models/mistral/modeling_mistral.py)."""
    norm = blocks.llama_rms_norm
    rotary_decoder(t, spec, layers, layer=partial(blocks.decoder_layer, norm=norm), norm=norm)
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


families.add("mistral", Family("mistral", read, forward=forward, config_class="MistralConfig"))
