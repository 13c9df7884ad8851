"""MiniMax-M2: sigmoid routing with corrected scores, norms over whole queries and keys, partly rotated heads."""

from __future__ import annotations

from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families import Family, families
from simulator.families.decoder import read_attention, read_decoder, read_depth, read_hidden, read_rotary_dim
from simulator.families.experts.reading import read_experts, with_load_balancing
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_HIDDEN
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a MiniMax-M2 config; defaults are those of MiniMaxM2Config in transformers 5.23.0."""
    hidden = read_hidden(config, 3072)
    attention = read_attention(config, hidden, heads=48, kv_heads=8, head_dim=128, even=False)
    share = 1.0
    if config.given("rotary_dim"):  # the released files' own key (`MiniMaxM2Config.convert_rope_params_to_dict`)
        share = config.size("rotary_dim", attention.head_dim, LARGEST_HIDDEN) / attention.head_dim
    attention = attrs.evolve(attention, rotary_dim=read_rotary_dim(config, attention.head_dim, share))
    experts = read_experts(
        config, width=("intermediate_size", 1536), experts=("num_local_experts", 256), per_token=8, balanced=True
    )
    layers = [LayerSpec(attention, experts)] * read_depth(config, 62)
    return with_load_balancing(config, read_decoder(config, hidden, layers, vocab=200064, positions=196608))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`MiniMaxM2ForCausalLM` (transformers models/minimax_m2/modeling_minimax_m2.py)."""
    norm = blocks.llama_rms_norm
    states = partial(blocks.separate_states, norm=norm, normed="projection")
    layer = partial(
        blocks.decoder_layer,
        norm=norm,
        attend=partial(blocks.rotary_attention, states=states, rotate=partial(blocks.rotate_part, join_late=True)),
        feed=partial(blocks.experts_mlp, router=blocks.sigmoid_router),
    )
    rotary_decoder(t, spec, layers, layer=layer, norm=norm)
    attention = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    t.order_layer_parameters(*attention, "mlp", *blocks.BEFORE)


families.add(
    "minimax_m2",
    Family(
        "minimax_m2",
        read,
        forward=forward,
        config_class="MiniMaxM2Config",
        aliases={"num_experts": "num_local_experts"},
    ),
)
