"""OLMoE (arXiv:2409.02060): norms over whole queries and keys, 64 narrow experts."""

from __future__ import annotations

from functools import partial

from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import read_attention, read_decoder, read_depth, read_hidden
from simulator.families.experts.reading import read_experts, with_load_balancing
from simulator.families.reader import ConfigReader
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of an OLMoE config; defaults are those of OlmoeConfig in transformers 5.23.0."""
    config.refuse("clip_qkv", (None,), "set it to null")
    config.refuse("head_dim", (None,), "remove it: the norms of queries and keys are hidden_size wide")
    hidden = read_hidden(config, 2048)
    attention = read_attention(config, hidden, heads=16, bias=config.flag("attention_bias", False))
    experts = read_experts(
        config,
        width=("intermediate_size", 2048),
        experts=("num_experts", 64),
        per_token=8,
        normalised=False,
        balanced=True,
    )
    layers = [LayerSpec(attention, experts)] * read_depth(config, 16)
    return with_load_balancing(config, read_decoder(config, hidden, layers, vocab=50304, positions=4096))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`OlmoeForCausalLM` (transformers models/olmoe/modeling_olmoe.py)."""
    states = partial(blocks.separate_states, norm=blocks.llama_rms_norm, normed="projection")
    layer = partial(
        blocks.decoder_layer,
        norm=blocks.llama_rms_norm,
        attend=partial(blocks.rotary_attention, states=states),
        feed=partial(blocks.experts_mlp, router=blocks.softmax_router),
    )
    rotary_decoder(t, spec, layers, layer=layer, norm=blocks.llama_rms_norm)
    attention = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    t.order_layer_parameters(*attention, "mlp", "input_layernorm", "post_attention_layernorm")


families.add(
    "olmoe",
    Family("olmoe", read, forward=forward, config_class="OlmoeConfig", aliases={"num_local_experts": "num_experts"}),
)
