"""DeepSeek-V2 (arXiv:2405.04434): latent attention with complex rotary positions, dense layers before experts."""

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

GROUP_LIMITED = "group_limited_greedy"


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a DeepSeek-V2 config; defaults are those of DeepseekV2Config in transformers 5.23.0."""
    hidden = read_hidden(config)
    attention = read_latent_attention(config, heads=32, query_rank=1536, interleaved=True)
    experts = read_routed(config, width=1407, experts=64, per_token=2, shared=2, normalised=None)
    if config.one_of("topk_method", "greedy", ("greedy", GROUP_LIMITED)) == GROUP_LIMITED:
        experts = read_groups(config, experts)
        config.check(experts.groups > 1, f"n_group must be 2 or more with topk_method {GROUP_LIMITED}", "n_group")
    layers = read_latent_layers(config, attention, experts, read_depth(config), dense=0, width=11008)
    return read_decoder(config, hidden, layers, vocab=102400)


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`DeepseekV2ForCausalLM` (transformers models/deepseek_v2/modeling_deepseek_v2.py)."""
    latent_decoder(t, spec, layers, blocks.complex_rotary_table, blocks.scaled_softmax_router)


_FAMILY = Family("deepseek_v2", read, forward=forward, config_class="DeepseekV2Config", implementations=IN_MEGATRON)
families.add("deepseek_v2", _FAMILY)
