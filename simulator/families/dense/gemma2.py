"""Gemma 2 (arXiv:2408.00118): alternating sliding and full attention, soft caps, tied embeddings."""

from __future__ import annotations

import attrs

from simulator import blocks, ops
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import (
    FULL,
    SLIDING,
    read_attention,
    read_decoder,
    read_depth,
    read_gated,
    read_hidden,
    read_windows,
)
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Gemma 2 config; defaults are those of Gemma2Config in transformers 5.23.0."""
    config.refuse("use_bidirectional_attention", (False, None), "set it to false")
    hidden = read_hidden(config, 2304)
    bias = config.flag("attention_bias", False)
    attention = read_attention(config, hidden, heads=8, kv_heads=4, head_dim=256, bias=bias)
    attention = attrs.evolve(attention, softcap=config.softcap("attn_logit_softcapping", 50.0))
    feed_forward = read_gated(config, width=9216, activation="gelu_pytorch_tanh", key="hidden_activation")
    depth = read_depth(config, 26)
    kinds = [FULL if index % 2 else SLIDING for index in range(depth)]
    windows = read_windows(config, depth, window=4096, kinds=kinds, rule=f"{SLIDING} and {FULL} in turn")
    layers = [LayerSpec(attrs.evolve(attention, window=each), feed_forward) for each in windows]
    softcap = config.softcap("final_logit_softcapping", 30.0)
    return read_decoder(config, hidden, layers, vocab=256000, positions=8192, tied=True, final_softcap=softcap)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Gemma2ForCausalLM` (transformers models/gemma2/modeling_gemma2.py): scaled embeddings, a mask per layer kind."""
    rotary_decoder(t, spec, layers, embed=_embed, layer=_layer, norm=blocks.gemma_rms_norm, windows=True)
    before, after = "input_layernorm", "post_attention_layernorm"
    t.order_layer_parameters(
        "self_attn", "mlp", before, after, "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )


def _embed(t: Trace, vocabulary: Tensor, ids: Tensor) -> Tensor:
    """`Gemma2TextScaledWordEmbedding`."""
    embeds = blocks.look_up(t, vocabulary, ids, "embed_tokens")
    with t.call("embed_tokens"):
        return ops.mul(t, embeds, t.buffer("embed_scale", dtype=t.regime.weights))


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`Gemma2DecoderLayer`: norms before and after both halves."""
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.gemma_rms_norm(t, "input_layernorm", x))
        hidden, weights = blocks.rotary_attention(t, hidden, tables, mask, layer.attention)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        hidden = local("hidden", blocks.gemma_rms_norm(t, "post_attention_layernorm", hidden))
        residual = local("residual", local("hidden", ops.add(t, x, hidden)))
        hidden = local("hidden", blocks.gemma_rms_norm(t, "pre_feedforward_layernorm", residual))
        hidden = local("hidden", blocks.gated_mlp(t, hidden, layer.feed_forward))
        hidden = local("hidden", blocks.gemma_rms_norm(t, "post_feedforward_layernorm", hidden))
        return ops.add(t, residual, hidden)


families.add("gemma2", Family("gemma2", read, forward=forward, config_class="Gemma2Config"))
