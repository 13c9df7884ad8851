"""OLMo 2 (arXiv:2501.00656): norms behind both halves only, and on all heads of queries and keys at once."""

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
    """The spec of an OLMo 2 config; defaults are those of Olmo2Config in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_attention(config, hidden, bias=config.flag("attention_bias", False), even=False)
    layers = [LayerSpec(attention, read_gated(config, width=11008))] * read_depth(config)
    return read_decoder(config, hidden, layers, vocab=50304)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Olmo2ForCausalLM` (transformers models/olmo2/modeling_olmo2.py): rotary positions in fp32."""
    norm = partial(blocks.llama_rms_norm, weight_in_fp32=True)
    of_states = partial(norm, liger=NormPatch.NONE)
    states = partial(blocks.separate_states, norm=of_states, normed="projection")
    attend = partial(blocks.rotary_attention, states=states, rotate=blocks.rotate_in)
    of_layer = partial(norm, liger=NormPatch.APART)
    layer = partial(blocks.decoder_layer, norm=of_layer, before=blocks.NONE, after=blocks.AFTER, attend=attend)
    tables = partial(blocks.rotary_tables, cast=False)
    rotary_decoder(t, spec, layers, layer=layer, norm=norm, make_tables=tables)
    t.order_layer_parameters("self_attn", *blocks.PROJECTIONS, "q_norm", "k_norm", "mlp", *blocks.AFTER)


families.add("olmo2", Family("olmo2", read, forward=forward, config_class="Olmo2Config"))
