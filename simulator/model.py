"""What a model is to the simulator: a list of layer specs, never one spec times a count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from attrs.validators import deep_iterable, instance_of, optional

from hardware.errors import UsageError
from simulator.limits import (
    LARGEST_HEADS,
    LARGEST_HIDDEN,
    LARGEST_LAYERS,
    LARGEST_POSITIONS,
    LARGEST_SOFTCAP,
    LARGEST_VOCAB,
    LARGEST_WIDTH,
    count_rule,
    is_count,
    is_number,
    shown,
)

_Validator = Callable[[Any, "attrs.Attribute[Any]", Any], None]


def _count(largest: int) -> _Validator:
    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not is_count(value, largest):
            raise UsageError(f"{attribute.name} {count_rule(largest)}, not {shown(value)}")

    return check


def _between(smallest: float, largest: float) -> _Validator:
    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not is_number(value, smallest, largest):
            raise UsageError(f"{attribute.name} must be a number from {smallest} to {largest}, not {shown(value)}")

    return check


_rate = _between(0.0, 1.0)
_softcap = optional(_between(1e-9, LARGEST_SOFTCAP))
_flag = instance_of(bool)


@attrs.frozen
class TokenMixerSpec:
    """What lets the tokens of one layer see each other: attention, a state space model, a linear recurrence."""


@attrs.frozen
class AttentionSpec(TokenMixerSpec):
    """Multi-head, grouped-query or multi-query attention of one layer."""

    heads: int = attrs.field(validator=_count(LARGEST_HEADS))
    kv_heads: int = attrs.field(validator=_count(LARGEST_HEADS))
    head_dim: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    bias: bool = attrs.field(default=False, validator=_flag)
    dropout: float = attrs.field(default=0.0, validator=_rate)
    window: int | None = attrs.field(default=None, validator=optional(_count(LARGEST_POSITIONS)))
    """Sliding-window length in tokens; None attends to the whole sequence."""
    rotary_dim: int | None = attrs.field(default=None, validator=optional(_count(LARGEST_HIDDEN)))
    """Channels of a head that carry its position; None for all of them."""
    softcap: float | None = attrs.field(default=None, validator=_softcap)
    """Soft cap on attention scores (Gemma 2); None leaves them as they are."""

    def __attrs_post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UsageError(f"heads must be a multiple of kv_heads, not {self.heads} and {self.kv_heads}")
        if self.heads * self.head_dim > LARGEST_WIDTH:
            raise UsageError(f"heads x head_dim must be at most {LARGEST_WIDTH}, not {self.heads} x {self.head_dim}")

    @property
    def rotary_width(self) -> int:
        """Channels of a head that rotary positions turn."""
        return self.rotary_dim or self.head_dim

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@attrs.frozen(kw_only=True)
class LatentAttentionSpec(AttentionSpec):
    """Multi-head latent attention: keys and values of every head are made from one low-rank latent per token."""

    latent: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    """Channels of the latent that keys and values come from."""
    value_dim: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    query_rank: int | None = attrs.field(default=None, validator=optional(_count(LARGEST_HIDDEN)))
    """Rank of the queries' projection; None where it is full."""
    interleaved: bool = attrs.field(default=True, validator=_flag)
    """Whether positions turn neighbouring channels, instead of both halves."""

    @property
    def plain_dim(self) -> int:
        """Channels of a query or key without a position."""
        return self.head_dim - self.rotary_width


@attrs.frozen
class FeedForwardSpec:
    """The MLP of one layer: gated (SwiGLU style) or plain."""

    width: int = attrs.field(validator=_count(LARGEST_WIDTH))
    activation: str = attrs.field(default="silu", validator=instance_of(str))
    gated: bool = attrs.field(default=True, validator=_flag)
    bias: bool = attrs.field(default=False, validator=_flag)


@attrs.frozen
class LayerSpec:
    """One layer: a token mixer, a channel mixer, or both (hybrids have layers of one of them)."""

    token_mixer: TokenMixerSpec | None
    channel_mixer: FeedForwardSpec | None

    @property
    def attention(self) -> AttentionSpec:
        """The token mixer of a layer that is known to have attention."""
        assert isinstance(self.token_mixer, AttentionSpec)
        return self.token_mixer

    @property
    def feed_forward(self) -> FeedForwardSpec:
        """The channel mixer of a layer that is known to have one."""
        assert self.channel_mixer is not None
        return self.channel_mixer


@attrs.frozen
class Part:
    """A part of a checkpoint whose parameters are counted but not simulated (a vision tower)."""

    name: str
    parameters: int = attrs.field(validator=instance_of(int))


@attrs.frozen
class ModelSpec:
    """A decoder as its config.json describes it; sizes in elements, rates as probabilities."""

    name: str
    family: str
    hidden: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    vocab: int = attrs.field(validator=_count(LARGEST_VOCAB))
    max_positions: int = attrs.field(validator=_count(LARGEST_POSITIONS))
    layers: tuple[LayerSpec, ...] = attrs.field(validator=deep_iterable(instance_of(LayerSpec), instance_of(tuple)))
    tied_embeddings: bool = attrs.field(default=False, validator=_flag)
    embedding_dropout: float = attrs.field(default=0.0, validator=_rate)
    residual_dropout: float = attrs.field(default=0.0, validator=_rate)
    final_softcap: float | None = attrs.field(default=None, validator=_softcap)
    """Soft cap on the logits (Gemma 2)."""
    embedding_width: int | None = attrs.field(default=None, validator=optional(_count(LARGEST_HIDDEN)))
    """Channels of the vocabulary's table where they are not `hidden` (OPT-350m projects them)."""
    norm_first: bool = attrs.field(default=True, validator=_flag)
    """Whether norms stand before each half of a layer; after it otherwise."""
    final_norm: bool = attrs.field(default=True, validator=_flag)
    """Whether a norm follows the last layer."""
    parallel_blocks: bool = attrs.field(default=False, validator=_flag)
    """Whether attention and MLP of a layer read the same hidden states."""
    parts: tuple[Part, ...] = ()
    """What the checkpoint holds beside the simulated decoder."""
    assumptions: tuple[str, ...] = ()
    """One line for each value that the config did not give and a class default filled in."""

    def __attrs_post_init__(self) -> None:
        if not is_count(len(self.layers), LARGEST_LAYERS):
            raise UsageError(f"layers must hold from 1 to {LARGEST_LAYERS} layer specs, not {len(self.layers)}")
