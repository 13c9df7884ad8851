"""Llama (Touvron et al., arXiv:2302.13971): RMSNorm, rotary positions, gated MLP, grouped queries."""

from __future__ import annotations

from functools import partial

from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import read_attention, read_decoder, read_depth, read_gated, read_hidden
from simulator.families.reader import ConfigReader
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Llama config; defaults are those of LlamaConfig in transformers 5.23.0."""
    config.refuse("pretraining_tp", (None, 1), "set it to 1")
    hidden = read_hidden(config)
    attention = read_attention(config, hidden, bias=config.flag("attention_bias", False))
    feed_forward = read_gated(config, width=11008, bias=config.flag("mlp_bias", False))
    return read_decoder(config, hidden, [LayerSpec(attention, feed_forward)] * read_depth(config))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`LlamaForCausalLM` (transformers models/llama/modeling_llama.py)."""
    norm = blocks.llama_rms_norm
    rotary_decoder(t, spec, layers, layer=partial(blocks.decoder_layer, norm=norm), norm=norm)
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


_OTHERS = {
    "torchtitan": "simulator.implementations.torchtitan",
    "torchtune": "simulator.implementations.torchtune",
    "megatron": "simulator.implementations.megatron",
    "megatron_te": "simulator.implementations.megatron",
}
families.add("llama", Family("llama", read, forward=forward, config_class="LlamaConfig", implementations=_OTHERS))
