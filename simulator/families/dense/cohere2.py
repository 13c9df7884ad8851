"""Command R7B and Command A (arXiv:2504.00698): parallel halves, one norm without bias, rotary positions in windows."""

from __future__ import annotations

from functools import partial

import attrs

from hardware.dtypes import FP32
from simulator import blocks, ops
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
from simulator.graph import Tensor
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Cohere 2 config; defaults are those of Cohere2Config in transformers 5.23.0."""
    hidden = read_hidden(config, 8192)
    attention = read_attention(config, hidden, heads=64, bias=config.flag("attention_bias", False), even=False)
    feed_forward = read_gated(config, width=22528)
    depth = read_depth(config, 40)
    kinds = read_pattern(config, depth, every=4)
    windows = read_windows(config, depth, window=4096, kinds=kinds, rule="each sliding_window_pattern-th is full")
    layers = [
        LayerSpec(attrs.evolve(attention, window=each, rotary=each is not None), feed_forward) for each in windows
    ]
    return read_decoder(config, hidden, layers, vocab=256000, positions=8192, tied=True)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Cohere2ForCausalLM` (transformers models/cohere2/modeling_cohere2.py)."""
    norm, windows = blocks.cohere_layer_norm, full_and_sliding_windows(spec)
    rotary_decoder(t, spec, layers, layer=_layer, norm=norm, windows=windows, scale_logits=ops.mul_scalar)
    t.order_layer_parameters("self_attn", "mlp", "input_layernorm")


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, Tensor], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`Cohere2DecoderLayer`: attention and MLP read the same norm; both are added at the end."""
    rotate = partial(blocks.rotate_in, compute=FP32)
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.cohere_layer_norm(t, "input_layernorm", x))
        attended, weights = blocks.rotary_attention(t, hidden, tables, mask, layer.attention, rotate=rotate)
        local("attended", attended)
        if weights is not None:
            local("_", weights)
        fed = local("fed", blocks.gated_mlp(t, hidden, layer.feed_forward))
        return ops.add(t, ops.add(t, x, attended), fed)


families.add("cohere2", Family("cohere2", read, forward=forward, config_class="Cohere2Config"))
