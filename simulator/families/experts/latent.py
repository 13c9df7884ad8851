"""What DeepSeek's families share: latent attention, and experts after a few dense layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from simulator import blocks
from simulator.decoder import BuiltLayers, rotary_decoder
from simulator.families.decoder import read_gated
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_LAYERS
from simulator.model import AttentionSpec, ExpertsSpec, LatentAttentionSpec, LayerSpec, ModelSpec
from simulator.trace import Trace

IN_MEGATRON = {"megatron_te": "simulator.implementations.megatron"}


def read_latent_attention(
    config: ConfigReader, *, heads: int, query_rank: int | None, interleaved: bool
) -> LatentAttentionSpec:
    """Latent attention of `heads` heads by default; a null ``q_lora_rank`` means queries of full rank."""
    count = config.required_size("num_attention_heads", heads, LARGEST_HEADS)
    kv_heads = config.derived_size("num_key_value_heads", count, "num_attention_heads", LARGEST_HEADS)
    same = f"num_key_value_heads must be num_attention_heads, not {kv_heads} and {count}: every head has its own keys"
    config.check(kv_heads == count, same, "num_key_value_heads", "num_attention_heads")
    rotary = config.size("qk_rope_head_dim", 64, LARGEST_HIDDEN)
    config.check(rotary % 2 == 0, f"qk_rope_head_dim must be even, not {rotary}", "qk_rope_head_dim")
    return LatentAttentionSpec(
        heads=count,
        kv_heads=count,
        head_dim=config.size("qk_nope_head_dim", 128, LARGEST_HIDDEN) + rotary,
        bias=config.flag("attention_bias", False),
        dropout=config.rate("attention_dropout", 0.0),
        latent=config.size("kv_lora_rank", 512, LARGEST_HIDDEN),
        rotary_dim=rotary,
        value_dim=config.size("v_head_dim", 128, LARGEST_HIDDEN),
        query_rank=config.optional_size("q_lora_rank", query_rank or 1, LARGEST_HIDDEN),
        interleaved=interleaved,
    )


def read_latent_layers(
    config: ConfigReader, attention: LatentAttentionSpec, experts: ExpertsSpec, depth: int, *, dense: int, width: int
) -> list[LayerSpec]:
    """`dense` layers with an MLP by default, then layers with `experts`."""
    first = min(depth, config.count("first_k_dense_replace", dense, LARGEST_LAYERS))
    mlp = read_gated(config, width=width, bias=config.flag("mlp_bias", False))
    return [LayerSpec(attention, mlp)] * first + [LayerSpec(attention, experts)] * (depth - first)


def latent_decoder(
    t: Trace, spec: ModelSpec, layers: BuiltLayers, tables: Callable[..., tuple[Tensor, ...]], router: blocks.Router
) -> None:
    """The decoder of `layers` with positions as `tables` makes them and experts as `router` chooses them."""
    norm = blocks.llama_rms_norm
    block = partial(blocks.experts_and_shared_mlp, router=router)
    layer = partial(
        blocks.decoder_layer, norm=norm, attend=_attend, feed=partial(blocks.experts_or_gated_mlp, block=block)
    )
    rotary_decoder(t, spec, layers, layer=layer, norm=norm, make_tables=tables)
    t.order_layer_parameters("self_attn", "mlp", *blocks.BEFORE)


def _attend(
    t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor | None]:
    assert isinstance(spec, LatentAttentionSpec)
    return blocks.latent_attention(t, x, tables, mask, spec)
