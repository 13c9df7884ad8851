"""Gemma (arXiv:2403.08295): Llama with scaled, tied embeddings and norms in fp32."""

from __future__ import annotations

from functools import partial

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
from simulator.liger import NormPatch
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Gemma config; defaults are those of GemmaConfig in transformers 5.23.0."""
    config.refuse("use_bidirectional_attention", (False, None), "set it to false")
    hidden = read_hidden(config, 3072)
    bias = config.flag("attention_bias", False)
    attention = read_attention(config, hidden, heads=16, kv_heads=16, head_dim=256, bias=bias, even=False)
    feed_forward = read_gated(config, width=24576, activation="gelu_pytorch_tanh")
    layers = [LayerSpec(attention, feed_forward)] * read_depth(config, 28)
    return read_decoder(config, hidden, layers, vocab=256000, positions=8192, tied=True)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`GemmaForCausalLM` (transformers models/gemma/modeling_gemma.py)."""
    norm = partial(blocks.gemma_rms_norm, liger=NormPatch.IN_PLACE)
    layer = partial(blocks.decoder_layer, norm=norm)
    rotary_decoder(t, spec, layers, embed=blocks.scaled_embeddings, layer=layer, norm=norm)
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


families.add("gemma", Family("gemma", read, forward=forward, config_class="GemmaConfig"))
