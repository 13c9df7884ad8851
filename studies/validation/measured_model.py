"""The model of a measured run: a preset, or a config in the words of transformers or of Megatron-LM."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.reading import read_model, spec_from_config

#: The ``model_type`` of a config in the words of megatron/training/arguments.py.
MEGATRON_GPT = "megatron_gpt"
#: What its model has that others of these keys do not -> the one value that is modelled.
_GPT = {"model_type": MEGATRON_GPT, "gated_mlp": False, "hidden_act": "gelu", "norm_type": "LayerNorm"}
_GPT |= {"position_embedding": "learned_absolute", "attention_bias": True, "mlp_bias": True}
_SIZES = {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"}
_SIZES |= {"intermediate_size", "max_position_embeddings", "vocab_size", "tie_word_embeddings"}
_SIZES |= {"hidden_dropout", "attention_dropout"}


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
    name = row.get("model") or row["name"]
    model = _megatron_gpt(others, name) if others.get("model_type") == MEGATRON_GPT else spec_from_config(others, name)
    if config.get("e_score_correction_bias") is False:  # DeepSeek-V3 with the softmax router of V2
        model = attrs.evolve(model, family="deepseek_v2")
    padded = config.get("padded_vocab_size")
    return model if padded is None else attrs.evolve(model, vocab=padded)


def _megatron_gpt(config: Mapping[str, Any], name: str) -> ModelSpec:
    """GPT with learned positions, LayerNorm, GELU and biases, as Megatron-LM's arguments have it by default."""
    for key in sorted({*config, *_GPT} - _SIZES):
        if key not in _GPT or config.get(key) != _GPT[key]:
            raise UnsupportedError(
                f"config.{key} {json.dumps(config.get(key))} is not simulated yet for {MEGATRON_GPT}"
            )
    missing = sorted(_SIZES - set(config))
    if missing:
        raise UsageError(f"config.{missing[0]} must be there for {MEGATRON_GPT}")
    attention = AttentionSpec(
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        bias=True,
        dropout=config["attention_dropout"],
    )
    feed_forward = FeedForwardSpec(width=config["intermediate_size"], activation="gelu", gated=False, bias=True)
    return ModelSpec(
        name=name,
        family="gpt2",
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        layers=(LayerSpec(attention, feed_forward),) * config["num_hidden_layers"],
        tied_embeddings=config["tie_word_embeddings"],
        embedding_dropout=config["hidden_dropout"],
        residual_dropout=config["hidden_dropout"],
    )
