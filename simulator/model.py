"""What a model is to the simulator: a list of layer specs, never one spec times a count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
from attrs.validators import deep_iterable, instance_of, optional

from hardware.errors import UsageError
from simulator.limits import (
    LARGEST_EXPERTS,
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
    softcap: float | None = attrs.field(default=None, validator=_softcap)
    """Soft cap on attention scores (Gemma 2); None leaves them as they are."""
    output_bias: bool | None = attrs.field(default=None, validator=optional(_flag))
    """Whether the output projection has a bias; None where it has one if the others have."""
    query_norm: bool = attrs.field(default=False, validator=_flag)
    """Whether queries and keys are normed, where a family leaves that to its config (GLM-4.5)."""
    rotary: bool = attrs.field(default=True, validator=_flag)
    """Whether queries and keys are rotated (SmolLM3 and others leave it out in some layers)."""
    rotary_dim: int | None = attrs.field(default=None, validator=optional(_count(LARGEST_HIDDEN)))
    """Leading channels of a head that are rotated; None rotates all."""
    causal: bool = attrs.field(default=True, validator=_flag)
    """Whether a token sees only those before it; an encoder's see all."""
    clipped: bool = attrs.field(default=False, validator=_flag)
    """Whether queries, keys and values are clipped (MPT)."""

    def __attrs_post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise UsageError(f"heads must be a multiple of kv_heads, not {self.heads} and {self.kv_heads}")
        if self.heads * self.head_dim > LARGEST_WIDTH:
            raise UsageError(f"heads x head_dim must be at most {LARGEST_WIDTH}, not {self.heads} x {self.head_dim}")
        if self.rotated > self.head_dim:
            raise UsageError(f"rotary_dim must be at most head_dim, not {self.rotary_dim} and {self.head_dim}")

    @property
    def rotated(self) -> int:
        """Channels of a head that rotary tables are made for."""
        return self.rotary_dim or self.head_dim

    @property
    def out_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.bias if self.output_bias is None else self.output_bias

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
        return self.head_dim - self.rotated


@attrs.frozen(kw_only=True)
class TemperedAttentionSpec(AttentionSpec):
    """Attention whose queries are scaled by their position where they are not rotated."""

    tempered: bool = attrs.field(default=True, validator=_flag)


@attrs.frozen(kw_only=True)
class DeltaNetSpec(TokenMixerSpec):
    """A gated delta net: linear attention whose state decays and is corrected token by token (arXiv:2412.06464)."""

    key_heads: int = attrs.field(validator=_count(LARGEST_HEADS))
    value_heads: int = attrs.field(validator=_count(LARGEST_HEADS))
    key_dim: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    """Channels of a head of queries or keys."""
    value_dim: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    kernel: int = attrs.field(default=4, validator=_count(LARGEST_HIDDEN))
    """Length of the causal convolution over queries, keys and values, in tokens."""
    activation: str = attrs.field(default="silu", validator=instance_of(str))
    """What follows the convolution."""

    def __attrs_post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise UsageError(
                f"value_heads must be a multiple of key_heads, not {self.value_heads} and {self.key_heads}"
            )
        if self.channels > LARGEST_WIDTH:
            raise UsageError(f"heads x channels of queries, keys and values must be at most {LARGEST_WIDTH}")

    @property
    def groups(self) -> int:
        """Value heads that share one head of queries and keys."""
        return self.value_heads // self.key_heads

    @property
    def channels(self) -> int:
        """Channels that the convolution runs over: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@attrs.frozen(kw_only=True)
class LightningSpec(TokenMixerSpec):
    """Lightning attention: linear attention with a decaying state, block by block (arXiv:2401.04658)."""

    heads: int = attrs.field(validator=_count(LARGEST_HEADS))
    head_dim: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    block: int = attrs.field(validator=_count(LARGEST_POSITIONS))
    """Tokens of a block, inside of which all pairs are weighed."""
    activation: str = attrs.field(default="silu", validator=instance_of(str))
    """What follows the projection of queries, keys and values."""

    def __attrs_post_init__(self) -> None:
        if self.heads * self.head_dim > LARGEST_WIDTH:
            raise UsageError(f"heads x head_dim must be at most {LARGEST_WIDTH}, not {self.heads} x {self.head_dim}")


@attrs.frozen(kw_only=True)
class StateSpaceSpec(TokenMixerSpec):
    """A Mamba-2 mixer of one layer (Dao and Gu, arXiv:2405.21060)."""

    heads: int = attrs.field(validator=_count(LARGEST_HEADS))
    head_dim: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    state: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    """Channels of the state that each channel of a head carries along the sequence."""
    groups: int = attrs.field(validator=_count(LARGEST_HEADS))
    """Groups of heads that share what goes into the state and what is read from it."""
    kernel: int = attrs.field(validator=_count(LARGEST_HIDDEN))
    """Tokens that the short convolution in front of the scan sees."""
    chunk: int = attrs.field(validator=_count(LARGEST_POSITIONS))
    """Tokens of a chunk, inside of which the scan is a product of matrices."""
    bias: bool = attrs.field(default=False, validator=_flag)
    conv_bias: bool = attrs.field(default=True, validator=_flag)
    activation: str = attrs.field(default="silu", validator=instance_of(str))

    def __attrs_post_init__(self) -> None:
        if self.heads % self.groups:
            raise UsageError(f"heads must be a multiple of groups, not {self.heads} and {self.groups}")
        if self.inner > LARGEST_WIDTH:
            raise UsageError(f"heads x head_dim must be at most {LARGEST_WIDTH}, not {self.heads} x {self.head_dim}")

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Channels that the convolution sees: the heads', and the two shared projections of each group."""
        return self.inner + 2 * self.groups * self.state


@attrs.frozen
class FeedForwardSpec:
    """The MLP of one layer: gated (SwiGLU style) or plain."""

    width: int = attrs.field(validator=_count(LARGEST_WIDTH))
    activation: str = attrs.field(default="silu", validator=instance_of(str))
    gated: bool = attrs.field(default=True, validator=_flag)
    bias: bool = attrs.field(default=False, validator=_flag)
    dropout: float = attrs.field(default=0.0, validator=_rate)
    """Rate on what comes out of the activation (BioGPT)."""


@attrs.frozen
class ExpertsSpec(FeedForwardSpec):
    """A mixture of experts, each an MLP of `width` channels, of which every token visits `per_token`."""

    experts: int = attrs.field(kw_only=True, validator=_count(LARGEST_EXPERTS))
    per_token: int = attrs.field(kw_only=True, validator=_count(LARGEST_EXPERTS))
    normalised: bool = attrs.field(default=True, kw_only=True, validator=_flag)
    """Whether the weights of a token's experts are divided by their sum."""
    groups: int = attrs.field(default=1, kw_only=True, validator=_count(LARGEST_EXPERTS))
    """Groups of experts, some of which are chosen before experts are chosen in them (DeepSeek-V3)."""
    chosen_groups: int = attrs.field(default=1, kw_only=True, validator=_count(LARGEST_EXPERTS))
    shared_width: int | None = attrs.field(default=None, kw_only=True, validator=optional(_count(LARGEST_WIDTH)))
    """Channels of the MLP that every token visits; None where there is none."""
    latent: int | None = attrs.field(default=None, kw_only=True, validator=optional(_count(LARGEST_HIDDEN)))
    """Channels that tokens are projected to for the experts, and back from; None where they stay as they are."""

    def __attrs_post_init__(self) -> None:
        if self.per_token > self.experts:
            raise UsageError(f"per_token must be at most experts, not {self.per_token} and {self.experts}")
        if self.experts % self.groups or self.chosen_groups > self.groups:
            raise UsageError(
                f"experts must be a multiple of groups, and chosen_groups at most groups, not {self.experts}, "
                f"{self.groups} and {self.chosen_groups}"
            )

    @property
    def shared(self) -> FeedForwardSpec:
        """The MLP that every token visits, where there is one."""
        assert self.shared_width is not None
        return FeedForwardSpec(self.shared_width, self.activation, self.gated, self.bias)


@attrs.frozen
class LayerSpec:
    """One layer: a token mixer, a channel mixer, or both (hybrids have layers of one of them)."""

    token_mixer: TokenMixerSpec | None
    channel_mixer: FeedForwardSpec | None

    @property
    def attends(self) -> bool:
        """Whether its token mixer is attention."""
        return isinstance(self.token_mixer, AttentionSpec)

    @property
    def attention(self) -> AttentionSpec:
        """The token mixer of a layer that is known to have attention."""
        assert isinstance(self.token_mixer, AttentionSpec)
        return self.token_mixer

    @property
    def state_space(self) -> StateSpaceSpec:
        """The token mixer of a layer that is known to have a state space model."""
        assert isinstance(self.token_mixer, StateSpaceSpec)
        return self.token_mixer

    @property
    def feed_forward(self) -> FeedForwardSpec:
        """The channel mixer of a layer that is known to have one."""
        assert self.channel_mixer is not None
        return self.channel_mixer


@attrs.frozen
class PredictorSpec(LayerSpec):
    """The layer of a module that predicts a further token (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

    number: int = 0
    """Which of these modules it is part of: no layer stands for two of them, each having a loss of its own."""


@attrs.frozen
class ClassifierSpec:
    """A head that sorts whole sequences into classes."""

    classes: int = attrs.field(validator=_count(LARGEST_VOCAB))
    dropout: float = attrs.field(default=0.0, validator=_rate)
    """Rate on what the classifier reads."""


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
    fp32_residual: bool = attrs.field(default=False, validator=_flag)
    """Whether the residual stream is fp32, whatever the weights are (Mamba-2)."""
    norm_first: bool = attrs.field(default=True, validator=_flag)
    """Whether norms stand before each half of a layer; after it otherwise."""
    final_norm: bool = attrs.field(default=True, validator=_flag)
    """Whether a norm follows the last layer."""
    parallel_blocks: bool = attrs.field(default=False, validator=_flag)
    """Whether attention and MLP of a layer read the same hidden states."""
    load_balancing: bool = attrs.field(default=False, validator=_flag)
    """Whether a loss for evenly used experts is computed from the logits of all routers, and added."""
    token_types: int | None = attrs.field(default=None, validator=optional(_count(LARGEST_VOCAB)))
    """Kinds of tokens (first and second sentence) with embeddings of their own; None without them."""
    classifier: ClassifierSpec | None = attrs.field(default=None, validator=optional(instance_of(ClassifierSpec)))
    """The head of a sequence classifier; None for a language model's."""
    predictors: int = 0
    """Modules that predict further tokens, as the config says; how many are trained is the workload's."""
    parts: tuple[Part, ...] = ()
    """What the checkpoint holds beside the simulated decoder."""
    assumptions: tuple[str, ...] = ()
    """One line for each value that the config did not give and a class default filled in."""

    @property
    def depth(self) -> int:
        """Layers without those of modules that predict further tokens."""
        return sum(1 for layer in self.layers if not isinstance(layer, PredictorSpec))

    def with_predictors(self, count: int) -> ModelSpec:
        """The model with `count` modules that predict further tokens, each with a layer of the last one's kind."""
        last = self.layers[-1]
        further = [PredictorSpec(last.token_mixer, last.channel_mixer, number) for number in range(count)]
        return attrs.evolve(self, layers=(*self.layers, *further))

    def __attrs_post_init__(self) -> None:
        if not is_count(len(self.layers), LARGEST_LAYERS):
            raise UsageError(f"layers must hold from 1 to {LARGEST_LAYERS} layer specs, not {len(self.layers)}")
