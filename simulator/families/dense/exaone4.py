"""EXAONE 4.0 (arXiv:2507.11407): norms behind both halves and on each head, rotary positions in windows only."""

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
    read_pattern,
    read_windows,
)
from simulator.families.reader import ConfigReader
from simulator.liger import NormPatch
from simulator.limits import LARGEST_POSITIONS
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of an EXAONE 4 config; defaults are those of Exaone4Config in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_attention(config, hidden, kv_heads=32, even=False)
    feed_forward = read_gated(config, width=16384)
    depth = read_depth(config)
    length = config.optional_size("sliding_window", 4096, LARGEST_POSITIONS)
    windows = read_windows(
        config, depth, window=length, kinds=read_pattern(config, depth, every=4), rule="sliding_window_pattern"
    )
    layers = [
        LayerSpec(attrs.evolve(attention, window=each, rotary=length is None or each is not None), feed_forward)
        for each in windows
    ]
    return read_decoder(config, hidden, layers, vocab=102400)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Exaone4ForCausalLM` (transformers models/exaone4/modeling_exaone4.py)."""
    norm = partial(blocks.llama_rms_norm, liger=NormPatch.APART)
    states = partial(blocks.separate_states, norm=norm, normed="transposed")
    attend = partial(blocks.rotary_attention, states=states)
    layer = partial(blocks.decoder_layer, norm=norm, before=blocks.NONE, after=blocks.AFTER, attend=attend)
    rotary_decoder(t, spec, layers, layer=layer, norm=norm, windows=full_and_own_windows(spec))
    t.order_layer_parameters("self_attn", *blocks.PROJECTIONS, "q_norm", "k_norm", "mlp", *blocks.AFTER)


families.add("exaone4", Family("exaone4", read, forward=forward, config_class="Exaone4Config"))
