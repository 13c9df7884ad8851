"""Nemotron-4 and Minitron (arXiv:2402.16819): LayerNorm stored minus one, squared ReLU, partial rotary positions."""

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
    read_rotary_dim,
)
from simulator.families.reader import ConfigReader
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Nemotron config; defaults are those of NemotronConfig in transformers 5.23.0."""
    hidden = read_hidden(config, 6144)
    bias = config.flag("attention_bias", False)
    attention = read_attention(config, hidden, heads=48, bias=bias, even=False)
    attention = attrs.evolve(attention, rotary_dim=read_rotary_dim(config, attention.head_dim, 0.5))
    feed_forward = read_gated(config, width=24576, activation="relu2", bias=config.flag("mlp_bias", False))
    layers = [LayerSpec(attention, attrs.evolve(feed_forward, gated=False))] * read_depth(config)
    return read_decoder(config, hidden, layers, vocab=256000, positions=4096)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`NemotronForCausalLM` (transformers models/nemotron/modeling_nemotron.py)."""
    norm = blocks.layer_norm_1p
    attend = partial(blocks.rotary_attention, rotate=partial(blocks.rotate_part, join_late=True))
    layer = partial(blocks.decoder_layer, norm=norm, attend=attend, feed=blocks.plain_mlp)
    rotary_decoder(t, spec, layers, layer=layer, norm=norm)
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


families.add("nemotron", Family("nemotron", read, forward=forward, config_class="NemotronConfig"))
