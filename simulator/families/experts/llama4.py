"""Llama 4 with its vision tower: the language model is simulated, the tower is counted."""

from __future__ import annotations

import attrs

from simulator.families import Family, families
from simulator.families.experts.llama4_text import forward
from simulator.families.experts.llama4_text import read as read_text
from simulator.families.reader import ConfigReader
from simulator.families.towers import llama4_vision, vision_parts
from simulator.model import ModelSpec


def read(config: ConfigReader) -> ModelSpec:
    """The text model of a Llama 4 config, and its other parts (transformers models/llama4/configuration_llama4.py)."""
    text = read_text(config.section("text_config", "Llama4TextConfig"))
    return attrs.evolve(text, parts=vision_parts(config, text.hidden, "Llama4VisionConfig", llama4_vision))


families.add("llama4", Family("llama4", read, forward=forward, config_class="Llama4Config"))
