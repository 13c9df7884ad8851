"""The model of a measured run: a preset, or a config in the words of transformers or of Megatron-LM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from simulator.model import ModelSpec
from simulator.reading import read_model, spec_from_config


def measured_model(row: Mapping[str, Any]) -> ModelSpec:
    """The spec of `row`'s ``config``, or else of its ``model``.

    Embeddings have as many rows as they were padded to (``padded_vocab_size``).

    Raises:
        UnsupportedError: a family or a key that is not modelled.
        UsageError: a config that is wrong.
    """
    config = row.get("config")
    if config is None:
        return read_model(row["model"])
    others = {key: value for key, value in config.items() if key != "padded_vocab_size"}
    model = spec_from_config(others, row.get("model") or row["name"])
    padded = config.get("padded_vocab_size")
    return model if padded is None else attrs.evolve(model, vocab=padded)
