"""What the configurations of most decoders share: reading it once keeps a family to what makes it different.

Defaults are arguments, because each configuration class of transformers has its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from simulator.families.reader import ConfigReader
from simulator.limits import (
    LARGEST_HEADS,
    LARGEST_HIDDEN,
    LARGEST_LAYERS,
    LARGEST_POSITIONS,
    LARGEST_VOCAB,
    LARGEST_WIDTH,
)
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec

SLIDING = "sliding_attention"
FULL = "full_attention"


def read_hidden(config: ConfigReader, default: int = 4096) -> int:
    """Channels of the residual stream."""
    return config.required_size("hidden_size", default, LARGEST_HIDDEN)


def read_depth(config: ConfigReader, default: int = 32) -> int:
    """Number of layers."""
    return config.required_size("num_hidden_layers", default, LARGEST_LAYERS)


def read_even_heads(
    config: ConfigReader, hidden: int, default: int, *, key: str = "num_attention_heads", of: str = "hidden_size"
) -> tuple[int, int]:
    """Heads that share `hidden` channels evenly, and the channels of each.

    Args:
        config: the configuration.
        hidden: channels of the residual stream.
        default: number of heads.
        key: of that number.
        of: key of `hidden`.
    """
    heads = config.required_size(key, default, LARGEST_HEADS)
    config.multiple(of, key, hidden, heads)
    return heads, max(1, hidden // heads)


def read_attention(
    config: ConfigReader,
    hidden: int,
    *,
    heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    bias: bool = False,
    even: bool = True,
    null_kv_heads: bool = False,
) -> AttentionSpec:
    """Grouped-query attention with rotary positions.

    Args:
        config: the configuration.
        hidden: channels of the residual stream.
        heads: default number of query heads.
        kv_heads: default number of key/value heads; None for as many as there are query heads.
        head_dim: default channels of a head; None for ``hidden // heads``.
        bias: whether all four projections have one.
        even: whether hidden must divide into heads.
        null_kv_heads: whether null as the number of key/value heads means as many as there are query heads.
    """
    count = config.required_size("num_attention_heads", heads, LARGEST_HEADS)
    if even:
        config.multiple("hidden_size", "num_attention_heads", hidden, count)
    key, rule = "num_key_value_heads", "num_attention_heads"
    if kv_heads is None:
        kv = config.derived_size(key, count, rule, LARGEST_HEADS)
    elif null_kv_heads:
        kv = config.optional_size(key, kv_heads, LARGEST_HEADS) or count
    else:
        kv = config.size(key, kv_heads, LARGEST_HEADS)
    config.multiple("num_attention_heads", "num_key_value_heads", count, kv)
    derived = max(1, hidden // count)
    dim = (
        config.derived_size("head_dim", derived, "hidden_size // num_attention_heads", LARGEST_HIDDEN)
        if head_dim is None
        else config.size("head_dim", head_dim, LARGEST_HIDDEN)
    )
    config.rotary(dim)
    return AttentionSpec(count, kv, dim, bias=bias, dropout=config.rate("attention_dropout", 0.0))


def read_gated(
    config: ConfigReader, *, width: int, activation: str = "silu", key: str = "hidden_act", bias: bool = False
) -> FeedForwardSpec:
    """A gated MLP whose activation is under `key`."""
    size = config.required_size("intermediate_size", width, LARGEST_WIDTH)
    return FeedForwardSpec(width=size, activation=config.activation(key, activation), bias=bias)


def read_windows(
    config: ConfigReader, depth: int, *, window: int | None, kinds: Sequence[str], rule: str
) -> list[int | None]:
    """The sliding window of every layer, None where it sees the whole sequence.

    Args:
        config: the configuration, whose ``layer_types`` names a kind per layer.
        depth: number of layers.
        window: default length of the window in tokens.
        kinds: the kind of each layer where ``layer_types`` is not given.
        rule: how `kinds` came about, for the text of the assumption.
    """
    named = config.names("layer_types", kinds[:depth], (SLIDING, FULL), rule)
    length = config.optional_size("sliding_window", window, LARGEST_POSITIONS) if window else None
    no_window = f"sliding_window is null but layer_types has {SLIDING}: give a length in tokens"
    config.check(length is not None or SLIDING not in named, no_window, "sliding_window", "layer_types")
    return [length if kind == SLIDING else None for kind in named]


def read_late_windows(config: ConfigReader, depth: int) -> list[int | None]:
    """Windows of the layers from ``max_window_layers`` on, where ``use_sliding_window`` is set (Qwen2, Qwen3)."""
    used = config.flag("use_sliding_window", False)
    if not used:
        kinds, length = [FULL] * depth, None
    else:
        first = config.count("max_window_layers", 28, LARGEST_LAYERS)
        length = config.optional_size("sliding_window", 4096, LARGEST_POSITIONS)
        kinds = [SLIDING if length is not None and index >= first else FULL for index in range(depth)]
    return read_windows(config, depth, window=length, kinds=kinds, rule="the layers from max_window_layers on")


def read_pattern(config: ConfigReader, depth: int, every: int) -> list[str]:
    """Kinds of layers of which each ``sliding_window_pattern``-th, by default `every`-th, sees the whole sequence.

    Where ``layer_types`` is given the pattern is not read: it may be null, or letters (EXAONE 4).
    """
    if config.given("layer_types"):
        return [FULL] * depth
    period = config.size("sliding_window_pattern", every, LARGEST_LAYERS)
    return [FULL if (index + 1) % period == 0 else SLIDING for index in range(depth)]


def read_rotary_dim(config: ConfigReader, head_dim: int, default: float) -> int | None:
    """Channels of a head that are rotated, from ``partial_rotary_factor``; None where all are.

    The factor stands in ``rope_parameters``, ``rope_scaling`` or, in older files, beside them
    (transformers modeling_rope_utils.py `convert_rope_params_to_dict`).
    """
    factor = config.nested_rate(("rope_parameters", "rope_scaling"), "partial_rotary_factor", default)
    rotated = int(head_dim * factor)
    rule = f"partial_rotary_factor must give an even number of channels, not {rotated} of {head_dim}"
    config.check(rotated > 0 and rotated % 2 == 0, rule, "partial_rotary_factor", "head_dim")
    return None if rotated == head_dim else max(rotated, 1)


def read_decoder(
    config: ConfigReader,
    hidden: int,
    layers: Sequence[LayerSpec],
    *,
    vocab: int = 32000,
    positions: int | None = 2048,
    tied: bool = False,
    final_softcap: float | None = None,
    residual_dropout: float = 0.0,
) -> ModelSpec:
    """The model of `layers`, with the keys that every decoder has."""
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=config.required_size("vocab_size", vocab, LARGEST_VOCAB),
        max_positions=_read_positions(config, positions),
        layers=tuple(layers),
        tied_embeddings=config.flag("tie_word_embeddings", tied),
        final_softcap=final_softcap,
        residual_dropout=residual_dropout,
    )


def _read_positions(config: ConfigReader, positions: int | None) -> int:
    """The longest sequence; None for families whose positions have no bound."""
    if positions is None:
        return LARGEST_POSITIONS
    return config.size("max_position_embeddings", positions, LARGEST_POSITIONS)
