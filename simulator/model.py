"""What a model is to the simulator: a list of layer specs, never one spec times a count."""

from __future__ import annotations

import attrs
from attrs.validators import ge, gt, instance_of, optional

_positive_int = [instance_of(int), gt(0)]
_rate = ge(0.0)


@attrs.frozen
class AttentionSpec:
    """Multi-head, grouped-query or multi-query attention of one layer."""

    heads: int = attrs.field(validator=_positive_int)
    kv_heads: int = attrs.field(validator=_positive_int)
    head_dim: int = attrs.field(validator=_positive_int)
    bias: bool = False
    dropout: float = attrs.field(default=0.0, validator=_rate)
    window: int | None = attrs.field(default=None, validator=optional(gt(0)))
    """Sliding-window length in tokens; None attends to the whole sequence."""
    softcap: float | None = None
    """Soft cap on attention scores (Gemma 2); None leaves them as they are."""

    @property
    def groups(self) -> int:
        """Query heads that share one key/value head."""
        return self.heads // self.kv_heads


@attrs.frozen
class FeedForwardSpec:
    """The MLP of one layer: gated (SwiGLU style) or plain."""

    width: int = attrs.field(validator=_positive_int)
    activation: str = "silu"
    gated: bool = True
    bias: bool = False


@attrs.frozen
class LayerSpec:
    """One transformer layer."""

    attention: AttentionSpec
    feed_forward: FeedForwardSpec


@attrs.frozen
class ModelSpec:
    """A decoder as its config.json describes it; sizes in elements, rates as probabilities."""

    name: str
    family: str
    hidden: int = attrs.field(validator=_positive_int)
    vocab: int = attrs.field(validator=_positive_int)
    max_positions: int = attrs.field(validator=_positive_int)
    layers: tuple[LayerSpec, ...]
    tied_embeddings: bool = False
    embedding_dropout: float = attrs.field(default=0.0, validator=_rate)
    residual_dropout: float = attrs.field(default=0.0, validator=_rate)
    final_softcap: float | None = None
    """Soft cap on the logits (Gemma 2)."""
    assumptions: tuple[str, ...] = ()
    """One line for each value that the config did not give and a class default filled in."""
