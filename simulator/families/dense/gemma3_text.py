"""Gemma 3 (arXiv:2503.19786), the text model: Gemma 2 with normed queries and keys, rotary tables per layer kind."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers, full_and_sliding_windows, rotary_decoder
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
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Gemma 3 text config, also of that inside a multimodal one.

    Defaults are those of Gemma3TextConfig in transformers 5.23.0, whose attention ignores `attn_logit_softcapping`.
    """
    config.refuse("use_bidirectional_attention", (False, None), "set it to false")
    hidden = read_hidden(config, 2304)
    bias = config.flag("attention_bias", False)
    attention = read_attention(config, hidden, heads=8, kv_heads=4, head_dim=256, bias=bias)
    feed_forward = read_gated(config, width=9216, activation="gelu_pytorch_tanh", key="hidden_activation")
    depth = read_depth(config, 26)
    kinds = read_pattern(config, depth, every=6)
    windows = read_windows(config, depth, window=4096, kinds=kinds, rule="each sliding_window_pattern-th is full")
    layers = [LayerSpec(attrs.evolve(attention, window=each), feed_forward) for each in windows]
    softcap = config.softcap("final_logit_softcapping", None)
    return read_decoder(config, hidden, layers, vocab=262208, positions=131072, tied=True, final_softcap=softcap)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Gemma3ForCausalLM` (transformers models/gemma3/modeling_gemma3.py)."""
    norm, before, after = blocks.gemma_rms_norm, blocks.AROUND, blocks.AFTER
    states = partial(blocks.separate_states, norm=norm, normed="transposed")
    attend = partial(blocks.rotary_attention, states=states)
    layer = partial(blocks.decoder_layer, norm=norm, before=before, after=after, attend=attend)
    rotary_decoder(
        t,
        spec,
        layers,
        embed=blocks.scaled_embeddings,
        layer=layer,
        norm=norm,
        windows=full_and_sliding_windows(spec),
        tables_by_kind=True,
    )
    norms = (before[0], after[0], before[1], after[1])
    t.order_layer_parameters("self_attn", *blocks.PROJECTIONS, "q_norm", "k_norm", "mlp", *norms)


families.add("gemma3_text", Family("gemma3_text", read, forward=forward, config_class="Gemma3TextConfig"))
