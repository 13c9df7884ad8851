"""Qwen3 (arXiv:2505.09388): Llama with a norm on each head of queries and keys."""

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
from simulator.liger import NormPatch
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Qwen3 config; defaults are those of Qwen3Config in transformers 5.23.0."""
    hidden = read_hidden(config)
    bias = config.flag("attention_bias", False)
    attention = read_attention(config, hidden, kv_heads=32, head_dim=128, bias=bias, even=False, null_kv_heads=True)
    feed_forward = read_gated(config, width=22016)
    windows = read_late_windows(config, read_depth(config))
    layers = [LayerSpec(attrs.evolve(attention, window=each), feed_forward) for each in windows]
    return read_decoder(config, hidden, layers, vocab=151936, positions=32768)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Qwen3ForCausalLM` (transformers models/qwen3/modeling_qwen3.py)."""
    norm = blocks.llama_rms_norm
    states = partial(blocks.separate_states, norm=partial(norm, liger=NormPatch.NONE))
    attend = partial(blocks.rotary_attention, states=states)
    layer = partial(blocks.decoder_layer, norm=norm, attend=attend)
    rotary_decoder(t, spec, layers, layer=layer, norm=norm, windows=full_and_own_windows(spec))
    t.order_layer_parameters("self_attn", *blocks.PROJECTIONS, "q_norm", "k_norm", "mlp", *blocks.BEFORE)


families.add("qwen3", Family("qwen3", read, forward=forward, config_class="Qwen3Config"))
