"""Phi-3 and Phi-4 (arXiv:2404.14219): fused projections, dropout on both branches, rotary positions on a part."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks, ops
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
from simulator.limits import LARGEST_POSITIONS
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Phi-3 config; defaults are those of Phi3Config in transformers 5.23.0 (`embd_pdrop` is unused)."""
    hidden = read_hidden(config, 3072)
    attention = read_attention(config, hidden, even=False)
    rotary_dim = read_rotary_dim(config, attention.head_dim, 1.0)
    window = config.optional_size("sliding_window", None, LARGEST_POSITIONS)
    attention = attrs.evolve(attention, rotary_dim=rotary_dim, window=window)
    layers = [LayerSpec(attention, read_gated(config, width=8192))] * read_depth(config)
    dropout = config.rate("resid_pdrop", 0.0)
    return read_decoder(config, hidden, layers, vocab=32064, positions=4096, residual_dropout=dropout)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Phi3ForCausalLM` (transformers models/phi3/modeling_phi3.py)."""
    norm = blocks.llama_rms_norm
    attend = partial(blocks.rotary_attention, states=blocks.fused_states, rotate=blocks.rotate_part)
    branch = partial(ops.dropout, rate=spec.residual_dropout)
    layer = partial(blocks.decoder_layer, norm=norm, attend=attend, feed=blocks.fused_gated_mlp, branch=branch)
    rotary_decoder(t, spec, layers, layer=layer, norm=norm)
    t.order_layer_parameters("self_attn", "o_proj", "qkv_proj", "mlp", *blocks.BEFORE)


families.add("phi3", Family("phi3", read, forward=forward, config_class="Phi3Config"))
