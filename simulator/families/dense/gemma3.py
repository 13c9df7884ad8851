"""Gemma 3 with its vision tower: the language model is simulated, the tower is counted."""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator.decoder import BuiltLayers
from simulator.families import Family, families
from simulator.families.dense.gemma3_text import forward as forward_text
from simulator.families.dense.gemma3_text import read as read_text
from simulator.families.reader import ConfigReader
from simulator.families.towers import siglip, vision_parts
from simulator.model import ModelSpec
from simulator.trace import Trace


def read(config: ConfigReader) -> ModelSpec:
    """The text model of a Gemma 3 config, and its other parts (transformers models/gemma3/configuration_gemma3.py)."""
    text = read_text(config.section("text_config", "Gemma3TextConfig"))
    return attrs.evolve(text, parts=vision_parts(config, text.hidden, "SiglipVisionConfig", siglip))


def forward(t: Trace, spec: ModelSpec, layers: BuiltLayers) -> None:
    """`Gemma3ForConditionalGeneration` on text alone: its language model."""
    if t.regime.items_in_batch:  # `accepts_loss_kwargs` is false: its loss is not that of the text model
        raise UnsupportedError("'items_in_batch' is not taken by Gemma 3 with its vision tower: leave it out")
    forward_text(t, spec, layers)


families.add("gemma3", Family("gemma3", read, forward=forward, config_class="Gemma3Config"))
