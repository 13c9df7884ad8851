"""What the configurations of gated delta nets with full attention in some layers share, and their layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import attrs

from simulator import blocks
from simulator.blocks.delta_net import Project
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families.decoder import FULL, read_attention, read_rotary_dim
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_LAYERS
from simulator.model import AttentionSpec, DeltaNetSpec, LayerSpec, ModelSpec, TokenMixerSpec
from simulator.trace import Trace

LINEAR = "linear_attention"
PATH = (
    "linear attention runs the PyTorch functions of transformers, which are what is left without the packages "
    "flash-linear-attention and causal-conv1d; copies inside a convolution's kernel are not counted"
)
#: Modules and weights of attention, and the first of a delta net, in the order in which they are registered.
ATTENTION = ("self_attn", "q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
DELTA_NET = ("linear_attn", "dt_bias", "A_log", "conv1d")
#: What follows the token mixer.
REST = ("mlp", "gate", "experts", "shared_expert", "shared_expert_gate", "input_layernorm", "post_attention_layernorm")


def read_mixers(
    config: ConfigReader, hidden: int, depth: int, *, kv_heads: int, activation: str
) -> list[TokenMixerSpec]:
    """The token mixer of every layer: a delta net, but each ``full_attention_interval``-th has gated attention.

    Args:
        config: the configuration.
        hidden: channels of the residual stream.
        depth: number of layers.
        kv_heads: default number of key/value heads of attention.
        activation: what follows the convolution of a delta net; the MLP's, too.
    """
    interval = config.size("full_attention_interval", 4, LARGEST_LAYERS)
    pattern = [FULL if (index + 1) % interval == 0 else LINEAR for index in range(depth)]
    kinds = config.names("layer_types", pattern, (FULL, LINEAR), "each full_attention_interval-th sees all tokens")
    config.check(FULL in kinds, f"layer_types must have one {FULL}: without one nothing is rotated", "layer_types")
    config.assumptions.append(PATH)
    each: dict[str, TokenMixerSpec] = {
        FULL: _attention(config, hidden, kv_heads),
        LINEAR: _delta_net(config, activation),
    }
    return [each[kind] for kind in kinds]


def _attention(config: ConfigReader, hidden: int, kv_heads: int) -> AttentionSpec:
    bias = config.flag("attention_bias", False)
    spec = read_attention(config, hidden, heads=16, kv_heads=kv_heads, head_dim=256, bias=bias, even=False)
    return attrs.evolve(spec, rotary_dim=read_rotary_dim(config, spec.head_dim, 0.25))


def _delta_net(config: ConfigReader, activation: str) -> DeltaNetSpec:
    values = config.size("linear_num_value_heads", 32, LARGEST_HEADS)
    keys = config.size("linear_num_key_heads", 16, LARGEST_HEADS)
    config.multiple("linear_num_value_heads", "linear_num_key_heads", values, keys)
    return DeltaNetSpec(
        key_heads=keys,
        value_heads=values if values % keys == 0 else keys,
        key_dim=config.size("linear_key_head_dim", 128, LARGEST_HIDDEN),
        value_dim=config.size("linear_value_head_dim", 128, LARGEST_HIDDEN),
        kernel=config.size("linear_conv_kernel_dim", 4, LARGEST_HIDDEN),
        activation=activation,
    )


def with_mixers(layers: Sequence[LayerSpec], mixers: Sequence[TokenMixerSpec]) -> list[LayerSpec]:
    """The same layers, each with a token mixer of its own."""
    return [attrs.evolve(layer, token_mixer=mixer) for layer, mixer in zip(layers, mixers, strict=True)]


def mix(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, spec: TokenMixerSpec, *, project: Project
) -> tuple[Tensor, Tensor | None]:
    """Either token mixer: its output, and the weights where it has some."""
    if isinstance(spec, DeltaNetSpec):
        return blocks.gated_delta_net(t, x, mask, spec, project=project), None
    assert isinstance(spec, AttentionSpec)
    return blocks.gated_attention(t, x, tables, mask, spec, norm=blocks.gemma_rms_norm)


def delta_decoder(
    t: Trace,
    spec: ModelSpec,
    layers: BuiltLayers,
    *,
    project: Project,
    inputs: Sequence[str],
    make_tables: Callable[..., tuple[Tensor, ...]] = blocks.rotary_tables,
) -> None:
    """`...ForCausalLM` of delta nets and gated attention.

    Args:
        project: the projections of a delta net.
        inputs: its modules after the convolution, in the order in which they are registered.
        make_tables: of rotary positions.
    """
    block = partial(blocks.gated_shared_mlp, router=blocks.softmax_router)
    layer = partial(
        blocks.decoder_layer,
        norm=blocks.gemma_rms_norm,
        attend=partial(mix, project=project),
        feed=partial(blocks.experts_or_gated_mlp, block=block),
    )
    rotary_decoder(t, spec, layers, layer=layer, norm=blocks.gemma_rms_norm, make_tables=make_tables)
    t.order_layer_parameters(*ATTENTION, *DELTA_NET, *inputs, *REST)
