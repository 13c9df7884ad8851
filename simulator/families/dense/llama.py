"""Llama (Touvron et al., arXiv:2302.13971): RMSNorm, rotary positions, gated MLP, grouped queries."""

from __future__ import annotations

from simulator import blocks, ops
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import read_attention, read_decoder, read_depth, read_gated, read_hidden
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
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
    rotary_decoder(t, spec, layers, embed=_embed, layer=_layer, norm=blocks.llama_rms_norm)
    t.order_layer_parameters("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def _embed(t: Trace, vocabulary: Tensor, ids: Tensor) -> Tensor:
    return blocks.look_up(t, vocabulary, ids, "embed_tokens")


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`LlamaDecoderLayer`."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.llama_rms_norm(t, "input_layernorm", x))
        hidden, weights = blocks.rotary_attention(t, hidden, tables, mask, layer.attention)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        residual = local("residual", local("hidden", ops.add(t, x, hidden)))
        hidden = local("hidden", blocks.llama_rms_norm(t, "post_attention_layernorm", residual))
        hidden = local("hidden", blocks.gated_mlp(t, hidden, layer.feed_forward))
        return ops.add(t, residual, hidden)


_OTHERS = {
    "torchtitan": "simulator.implementations.torchtitan",
    "torchtune": "simulator.implementations.torchtune",
    "megatron": "simulator.implementations.megatron",
    "megatron_te": "simulator.implementations.megatron",
}
families.add("llama", Family("llama", read, forward=forward, config_class="LlamaConfig", implementations=_OTHERS))
