"""The model of a decoder whose layers are counted."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_POSITIONS, LARGEST_VOCAB
from simulator.model import LayerSpec, ModelSpec, Part


def counted_decoder(
    config: ConfigReader,
    text: ConfigReader,
    hidden: int,
    layers: Sequence[int],
    *,
    vocab: int,
    positions: int,
    tied: bool = False,
    others: int = 0,
    parts: Sequence[Part] = (),
) -> ModelSpec:
    """Embeddings, layers of so many parameters each, a final norm and a head.

    Args:
        config: the configuration, which says whether embeddings are tied.
        text: its section of the language model, or the configuration itself.
        hidden: channels of the residual stream.
        layers: parameters of each layer.
        vocab: default of ``vocab_size``.
        positions: default of ``max_position_embeddings``.
        tied: default of ``tie_word_embeddings``.
        others: parameters of the language model outside its layers, embeddings, final norm and head.
        parts: what stands beside the language model.
    """
    shared = config.flag("tie_word_embeddings", tied)
    size = text.required_size("vocab_size", vocab, LARGEST_VOCAB)
    total = size * hidden * (1 if shared else 2) + hidden + sum(layers) + others
    return ModelSpec(
        name=config.name,
        family=config.family,
        hidden=hidden,
        vocab=size,
        max_positions=text.size("max_position_embeddings", positions, LARGEST_POSITIONS),
        layers=(LayerSpec(None, None),) * len(layers),
        tied_embeddings=shared,
        parts=(Part("text", total), *parts),
    )
