"""Granite 3 (IBM, 2024): Llama with multipliers on embeddings, both branches and logits."""

from __future__ import annotations

from functools import partial

from simulator import blocks, ops
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
from simulator.graph import Tensor
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Granite config; defaults are those of GraniteConfig in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_attention(config, hidden, bias=config.flag("attention_bias", False), even=False)
    feed_forward = read_gated(config, width=11008, bias=config.flag("mlp_bias", False))
    return read_decoder(config, hidden, [LayerSpec(attention, feed_forward)] * read_depth(config))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`GraniteForCausalLM` (transformers models/granite/modeling_granite.py): a multiplier of 1 makes a tensor, too."""
    norm = blocks.llama_rms_norm
    layer = partial(blocks.decoder_layer, norm=norm, branch=ops.mul_scalar)
    rotary_decoder(t, spec, layers, embed=_embed, layer=layer, norm=norm, scale_logits=ops.div_scalar)
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


def _embed(t: Trace, vocabulary: Tensor, ids: Tensor) -> Tensor:
    return ops.mul_scalar(t, blocks.token_embeddings(t, vocabulary, ids))


families.add("granite", Family("granite", read, forward=forward, config_class="GraniteConfig"))
