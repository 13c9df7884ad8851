"""DeepSeek-V3 (arXiv:2412.19437) and models of its code (Kimi K2): latent attention, dense layers before experts."""

from __future__ import annotations

from simulator import blocks
from simulator.decoder import BuiltLayers
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_hidden
from simulator.families.experts.latent import IN_MEGATRON, latent_decoder, read_latent_attention, read_latent_layers
from simulator.families.experts.reading import read_groups, read_routed
from simulator.families.reader import ConfigReader
from simulator.model import ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of such a config; defaults are those of DeepseekV3Config in transformers 5.23.0."""
    hidden = read_hidden(config, 7168)
    interleaved = config.flag("rope_interleave", True)
    attention = read_latent_attention(config, heads=128, query_rank=1536, interleaved=interleaved)
    experts = read_routed(config, width=2048, experts=256, per_token=8, shared=1, normalised=True)
    experts = read_groups(config, experts, groups=8, chosen=4)
    layers = read_latent_layers(config, attention, experts, read_depth(config, 61), dense=3, width=18432)
    return read_decoder(config, hidden, layers, vocab=129280, positions=4096)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`DeepseekV3ForCausalLM` (transformers models/deepseek_v3/modeling_deepseek_v3.py)."""
    latent_decoder(t, spec, layers, blocks.rotary_tables, blocks.grouped_sigmoid_router)


for _name, _class in (("deepseek_v3", "DeepseekV3Config"), ("kimi_k2", "KimiK2Config")):
    families.add(_name, Family(_name, read, forward=forward, config_class=_class, implementations=IN_MEGATRON))
