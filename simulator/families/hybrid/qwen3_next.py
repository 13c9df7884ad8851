"""Qwen3-Next: gated delta nets (arXiv:2412.06464), gated attention in every fourth layer, many narrow experts."""

from __future__ import annotations

from simulator import blocks
from simulator.decoder import BuiltLayers
from simulator.families import Family, families
from simulator.families.decoder import read_decoder, read_depth, read_gated, read_hidden
from simulator.families.experts.reading import read_experts, read_sparse_layers, with_load_balancing
from simulator.families.hybrid.delta_net import delta_decoder, read_mixers, with_mixers
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_WIDTH
from simulator.model import ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The spec of a Qwen3-Next config; defaults are those of Qwen3NextConfig in transformers 5.23.0."""
    hidden, depth = read_hidden(config, 2048), read_depth(config, 48)
    experts = read_experts(
        config,
        width=("moe_intermediate_size", 512),
        experts=("num_experts", 512),
        per_token=10,
        normalised=True,
        shared_width=config.required_size("shared_expert_intermediate_size", 512, LARGEST_WIDTH),
        balanced=True,
    )
    dense = read_gated(config, width=5632)
    mixers = read_mixers(config, hidden, depth, kv_heads=2, activation=dense.activation)
    layers = with_mixers(read_sparse_layers(config, depth, None, dense, experts), mixers)
    return with_load_balancing(config, read_decoder(config, hidden, layers, vocab=151936, positions=32768))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Qwen3NextForCausalLM` (transformers models/qwen3_next/modeling_qwen3_next.py)."""
    inputs = ("in_proj_qkvz", "in_proj_ba", "norm", "out_proj")
    delta_decoder(t, spec, layers, project=blocks.fused_projections, inputs=inputs)


families.add("qwen3_next", Family("qwen3_next", read, forward=forward, config_class="Qwen3NextConfig"))
