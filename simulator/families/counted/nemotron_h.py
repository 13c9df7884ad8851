"""Nemotron-H (arXiv:2504.03624) and Nemotron 3: a pattern of Mamba-2, attention, expert and MLP layers."""

from __future__ import annotations

from simulator.families import Family, families
from simulator.families.counted.decoder import counted_decoder
from simulator.families.counting import linear
from simulator.families.decoder import read_attention, read_hidden
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_EXPERTS, LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_WIDTH
from simulator.model import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """The parts of such a config; defaults are those of NemotronHConfig in transformers 5.23.0."""
    for key in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"):
        config.refuse(key, (False, None), "set it to false")
    hidden = read_hidden(config, 4096)
    kinds = {"M": _mamba(config, hidden), "*": _attention(config, hidden), "E": _experts(config, hidden)}
    kinds["-"] = 2 * linear(hidden, config.size("intermediate_size", 21504, LARGEST_WIDTH))
    pattern = config.letters("hybrid_override_pattern", kinds)
    layers = [kinds[letter] + hidden for letter in pattern]
    return counted_decoder(config, config, hidden, layers, vocab=131072, positions=4096)


def _mamba(config: ConfigReader, hidden: int) -> int:
    """`NemotronHMamba2Mixer`: one projection for gates, states, time steps; a short convolution; a gated norm."""
    heads = config.size("mamba_num_heads", 128, LARGEST_HEADS)
    inner = heads * config.size("mamba_head_dim", 64, LARGEST_HIDDEN)
    groups = config.size("n_groups", 8, LARGEST_HEADS) * config.size("ssm_state_size", 128, LARGEST_HIDDEN)
    channels = inner + 2 * groups
    kernel = config.size("conv_kernel", 4, LARGEST_HIDDEN) + config.flag("use_conv_bias", True)
    return linear(hidden, inner + channels + heads) + channels * kernel + 3 * heads + inner + linear(inner, hidden)


def _attention(config: ConfigReader, hidden: int) -> int:
    spec = read_attention(config, hidden, heads=32, kv_heads=8, head_dim=128, even=False)
    return 2 * linear(hidden, spec.heads * spec.head_dim) + 2 * linear(hidden, spec.kv_heads * spec.head_dim)


def _experts(config: ConfigReader, hidden: int) -> int:
    """`NemotronHMoE`: experts without a gate, at the hidden size or at a latent one; a shared MLP."""
    count = config.size("n_routed_experts", 8, LARGEST_EXPERTS)
    width = config.size("moe_intermediate_size", 7688, LARGEST_WIDTH)
    shared = config.size("moe_shared_expert_intermediate_size", 7688, LARGEST_WIDTH)
    latent = (
        config.optional_size("moe_latent_size", hidden, LARGEST_HIDDEN) if config.given("moe_latent_size") else None
    )
    projections = 2 * linear(hidden, latent) if latent else 0
    return (
        count * 2 * linear(latent or hidden, width) + linear(hidden, count) + 2 * linear(hidden, shared) + projections
    )


families.add("nemotron_h", Family("nemotron_h", read, config_class="NemotronHConfig"))
