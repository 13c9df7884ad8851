"""Qwen3.5: gated delta nets with projections of their own, positions in a grid; dense or with experts.

Of a checkpoint with a vision tower the language model is simulated, and the tower is counted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import attrs

from simulator import blocks
from simulator.decoder import BuiltLayers
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_gated, read_hidden
from simulator.families.experts.reading import read_experts
from simulator.families.hybrid.delta_net import delta_decoder, read_mixers
from simulator.families.reader import ConfigReader
from simulator.families.towers import qwen3_vision, vision_parts
from simulator.limits import LARGEST_WIDTH
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace


def read_dense(config: ConfigReader) -> ModelSpec:
    """The spec of a Qwen3.5 text config; defaults are those of Qwen3_5TextConfig in transformers 5.23.0."""
    hidden, depth = read_hidden(config, 4096), read_depth(config, 32)
    feed_forward = read_gated(config, width=12288)
    mixers = read_mixers(config, hidden, depth, kv_heads=4, activation=feed_forward.activation)
    layers = [LayerSpec(mixer, feed_forward) for mixer in mixers]
    return read_decoder(config, hidden, layers, vocab=248320, positions=32768)


def read_sparse(config: ConfigReader) -> ModelSpec:
    """The spec of a Qwen3.5 text config with experts; defaults are those of Qwen3_5MoeTextConfig."""
    config.refuse("mlp_only_layers", ([], None), "remove it")
    config.refuse("decoder_sparse_step", (1, None), "set it to 1")
    hidden, depth = read_hidden(config, 2048), read_depth(config, 40)
    experts = read_experts(
        config,
        width=("moe_intermediate_size", 512),
        experts=("num_experts", 256),
        per_token=8,
        shared_width=config.required_size("shared_expert_intermediate_size", 512, LARGEST_WIDTH),
    )
    mixers = read_mixers(config, hidden, depth, kv_heads=2, activation=experts.activation)
    layers = [LayerSpec(mixer, experts) for mixer in mixers]
    return read_decoder(config, hidden, layers, vocab=248320, positions=32768)


def _read_wrapped(config: ConfigReader, read_text: Callable[[ConfigReader], ModelSpec], name: str) -> ModelSpec:
    """The text model of a wrapper's config, and its other parts; the wrapper says whether embeddings are tied."""
    section, tied = config.section("text_config", f"{name}TextConfig"), "tie_word_embeddings"
    if config.given(tied):
        section.values = {**section.values, tied: config.flag(tied, False)}
    text = read_text(section)
    return attrs.evolve(text, parts=vision_parts(config, text.hidden, f"{name}VisionConfig", qwen3_vision))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Qwen3_5ForCausalLM`, `Qwen3_5MoeForCausalLM` (transformers models/qwen3_5/modeling_qwen3_5.py)."""
    inputs = ("norm", "out_proj", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
    tables = blocks.grid_rotary_tables
    delta_decoder(t, spec, layers, project=blocks.separate_projections, inputs=inputs, make_tables=tables)


for _name, _class, _read in (("qwen3_5", "Qwen3_5", read_dense), ("qwen3_5_moe", "Qwen3_5Moe", read_sparse)):
    _wrapped = partial(_read_wrapped, read_text=_read, name=_class)
    families.add(_name, Family(_name, _wrapped, forward=forward, config_class=f"{_class}Config"))
    _text = f"{_name}_text"
    families.add(_text, Family(_text, _read, forward=forward, config_class=f"{_class}TextConfig"))
