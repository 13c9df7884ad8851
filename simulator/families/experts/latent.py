"""What DeepSeek's families share: latent attention, and experts after a few dense layers."""

from __future__ import annotations

from simulator import blocks, ops
from simulator.decoder import BuiltLayers, Tables, rotary_decoder
from simulator.families.decoder import read_gated
from simulator.families.reader import ConfigReader
from simulator.graph import Tensor
from simulator.limits import LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_LAYERS
from simulator.model import LatentAttentionSpec, LayerSpec, ModelSpec
from simulator.trace import Trace


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
    config: ConfigReader, attention: LatentAttentionSpec, depth: int, *, dense: int, width: int
) -> list[LayerSpec]:
    """`dense` layers with an MLP by default, then layers with experts."""
    first = min(depth, config.count("first_k_dense_replace", dense, LARGEST_LAYERS))
    mlp = LayerSpec(attention, read_gated(config, width=width, bias=config.flag("mlp_bias", False)))
    config.check(first == depth, "experts after the dense layers are not modelled yet", "first_k_dense_replace")
    return [mlp] * first


def latent_decoder(t: Trace, spec: ModelSpec, layers: BuiltLayers, tables: Tables) -> None:
    """The decoder of `layers` with positions as `tables` makes them."""
    rotary_decoder(t, spec, layers, embed=_embed, layer=_layer, norm=blocks.llama_rms_norm, tables=tables)
    t.order_layer_parameters("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def _embed(t: Trace, vocabulary: Tensor, ids: Tensor) -> Tensor:
    return blocks.look_up(t, vocabulary, ids, "embed_tokens")


def _layer(t: Trace, x: Tensor, tables: tuple[Tensor, ...], mask: Tensor | None, layer: LayerSpec) -> Tensor:
    """`DeepseekV3DecoderLayer`."""
    assert isinstance(layer.attention, LatentAttentionSpec)
    with t.call("layer", x) as local:
        hidden = local("hidden", blocks.llama_rms_norm(t, "input_layernorm", x))
        hidden, weights = blocks.latent_attention(t, hidden, tables, mask, layer.attention)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        residual = local("residual", local("hidden", ops.add(t, x, hidden)))
        hidden = local("hidden", blocks.llama_rms_norm(t, "post_attention_layernorm", residual))
        hidden = local("hidden", blocks.gated_mlp(t, hidden, layer.feed_forward))
        return ops.add(t, residual, hidden)
