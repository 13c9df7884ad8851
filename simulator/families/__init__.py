"""Model families: one file each, named for its `model_type`, imported when it is asked for.

A new family is one row of `BUILT_IN` and one file with its reader (and its graph recipe); outside
this package it is an entry point of the group ``vramsim.families`` that gives a `Family`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, cast

import attrs

from hardware.errors import UnsupportedError
from hardware.registry import Registry
from simulator.families.reader import ConfigReader
from simulator.limits import shown
from simulator.model import ModelSpec

ENTRY_POINTS = "vramsim.families"

# model_type -> (module that registers it, its configuration class in transformers 5.23.0)
BUILT_IN = {
    "bert": ("simulator.families.encoder.bert", "BertConfig"),
    "biogpt": ("simulator.families.early.biogpt", "BioGptConfig"),
    "bloom": ("simulator.families.early.bloom", "BloomConfig"),
    "codegen": ("simulator.families.early.codegen", "CodeGenConfig"),
    "cohere2": ("simulator.families.dense.cohere2", "Cohere2Config"),
    "deepseek_v2": ("simulator.families.experts.deepseek_v2", "DeepseekV2Config"),
    "deepseek_v3": ("simulator.families.experts.deepseek_v3", "DeepseekV3Config"),
    "deepseek_v32": ("simulator.families.counted.sparse_attention", "DeepseekV32Config"),
    "deepseek_v4": ("simulator.families.counted.deepseek_v4", "DeepseekV4Config"),
    "exaone4": ("simulator.families.dense.exaone4", "Exaone4Config"),
    "falcon": ("simulator.families.early.falcon", "FalconConfig"),
    "gemma": ("simulator.families.dense.gemma", "GemmaConfig"),
    "gemma2": ("simulator.families.dense.gemma2", "Gemma2Config"),
    "gemma3": ("simulator.families.dense.gemma3", "Gemma3Config"),
    "gemma3_text": ("simulator.families.dense.gemma3_text", "Gemma3TextConfig"),
    "gemma4": ("simulator.families.counted.gemma4", "Gemma4Config"),
    "glm4_moe": ("simulator.families.experts.glm4_moe", "Glm4MoeConfig"),
    "glm_moe_dsa": ("simulator.families.counted.sparse_attention", "GlmMoeDsaConfig"),
    "gpt2": ("simulator.families.early.gpt2", "GPT2Config"),
    "gpt_bigcode": ("simulator.families.early.gpt_bigcode", "GPTBigCodeConfig"),
    "gpt_neo": ("simulator.families.early.gpt_neo", "GPTNeoConfig"),
    "gpt_neox": ("simulator.families.early.gpt_neox", "GPTNeoXConfig"),
    "gpt_oss": ("simulator.families.experts.gpt_oss", "GptOssConfig"),
    "granite": ("simulator.families.dense.granite", "GraniteConfig"),
    "granitemoehybrid": ("simulator.families.hybrid.granitemoehybrid", "GraniteMoeHybridConfig"),
    "kimi_k2": ("simulator.families.experts.deepseek_v3", "KimiK2Config"),
    "llama": ("simulator.families.dense.llama", "LlamaConfig"),
    "llama4": ("simulator.families.experts.llama4", "Llama4Config"),
    "llama4_text": ("simulator.families.experts.llama4_text", "Llama4TextConfig"),
    "minimax": ("simulator.families.hybrid.minimax", "MiniMaxConfig"),
    "minimax_m2": ("simulator.families.experts.minimax_m2", "MiniMaxM2Config"),
    "mamba2": ("simulator.families.hybrid.mamba2", "Mamba2Config"),
    "mistral": ("simulator.families.dense.mistral", "MistralConfig"),
    "mixtral": ("simulator.families.experts.mixtral", "MixtralConfig"),
    "mpt": ("simulator.families.early.mpt", "MptConfig"),
    "nemotron": ("simulator.families.dense.nemotron", "NemotronConfig"),
    "nemotron_h": ("simulator.families.hybrid.nemotron_h", "NemotronHConfig"),
    "olmo2": ("simulator.families.dense.olmo2", "Olmo2Config"),
    "olmoe": ("simulator.families.experts.olmoe", "OlmoeConfig"),
    "opt": ("simulator.families.early.opt", "OPTConfig"),
    "phi3": ("simulator.families.dense.phi3", "Phi3Config"),
    "qwen2": ("simulator.families.dense.qwen2", "Qwen2Config"),
    "qwen2_moe": ("simulator.families.experts.qwen2_moe", "Qwen2MoeConfig"),
    "qwen3": ("simulator.families.dense.qwen3", "Qwen3Config"),
    "qwen3_5": ("simulator.families.hybrid.qwen3_5", "Qwen3_5Config"),
    "qwen3_5_moe": ("simulator.families.hybrid.qwen3_5", "Qwen3_5MoeConfig"),
    "qwen3_5_moe_text": ("simulator.families.hybrid.qwen3_5", "Qwen3_5MoeTextConfig"),
    "qwen3_5_text": ("simulator.families.hybrid.qwen3_5", "Qwen3_5TextConfig"),
    "qwen3_moe": ("simulator.families.experts.qwen3_moe", "Qwen3MoeConfig"),
    "qwen3_next": ("simulator.families.hybrid.qwen3_next", "Qwen3NextConfig"),
    "smollm3": ("simulator.families.dense.smollm3", "SmolLM3Config"),
}
_HEADS = re.compile(r"(Config|Model|LMHeadModel|DoubleHeadsModel|For[A-Z]\w*)$")


@attrs.frozen
class Family:
    """How one `model_type` is read and, once its recipe is there, built as a graph."""

    name: str
    """The `model_type` of its config.json."""
    read: Callable[[ConfigReader], ModelSpec]
    config_class: str = ""
    """Its configuration class; the text before `Config` also starts the names of its architectures."""
    aliases: Mapping[str, str] = attrs.field(factory=dict)
    """Other names of keys, other -> own (the class's `attribute_map`)."""
    bounded_positions: bool = False
    """Whether a table or a mask as long as `max_positions` ends every sequence."""
    forward: Callable[..., Any] | None = None
    """The graph recipe that follows transformers."""
    implementations: Mapping[str, str] = attrs.field(factory=dict)
    """Other implementations of the model -> the module whose `forward` is their recipe, imported when asked for."""

    @property
    def counted(self) -> bool:
        """Whether its parameters are counted only: no recipe builds its graph."""
        return self.forward is None and not self.implementations

    def recipe(self, implementation: str) -> Callable[..., Any]:
        """The recipe that follows `implementation`; `UnsupportedError` with those there are where there is none."""
        if implementation in self.implementations:
            return cast(Callable[..., Any], import_module(self.implementations[implementation]).forward)
        if implementation == "transformers" and self.forward is not None:
            return self.forward
        if self.counted:
            raise UnsupportedError(
                f"model_type {self.name} is counted, not simulated: no recipe builds its graph; take a model of "
                "another family, or register one with a recipe (docs/extending.md)"
            )
        known = ["transformers"] * (self.forward is not None) + sorted(self.implementations)
        raise UnsupportedError(
            f"'implementation' of {self.name} must be {' or '.join(known)}: {implementation!r} is not modelled"
        )


class FamilyRegistry(Registry[Family]):
    """A registry that knows its built-in names before their modules are imported."""

    def get(self, name: str) -> Family:
        """The family of a `model_type`; `UnsupportedError` with the known ones otherwise."""
        self._import(name)
        if name not in self:
            raise _unknown(name, self.names())
        return super().get(name)

    def add(self, name: str, item: Family) -> None:
        """Put `item` under `name`; a taken name raises `ValueError`."""
        self._import(name)
        super().add(name, item)

    def names(self) -> list[str]:
        """Every known `model_type`, sorted; imports no built-in family."""
        return sorted({*BUILT_IN, *super().names()})

    def find(self, name: str) -> Family:
        """The family of a `model_type`, a configuration class or an architecture."""
        return self.get(_MODEL_TYPES.get(_HEADS.sub("", name)) or self._plugged_in(name) or name)

    def _plugged_in(self, name: str) -> str | None:
        """The third-party family whose configuration class starts like `name`."""
        if not _HEADS.search(name):
            return None
        others = [each for each in self.names() if each not in BUILT_IN]
        stem = _HEADS.sub("", name)
        return next((each for each in others if self.get(each).config_class == f"{stem}Config"), None)

    def _import(self, name: str) -> None:
        if name in BUILT_IN:
            import_module(BUILT_IN[name][0])

    def _load(self, name: str, load: Callable[[], Family]) -> None:
        self._import(name)  # so that a plug-in of the same name is seen to hide behind the built-in one
        super()._load(name, load)


_MODEL_TYPES = {config_class.removesuffix("Config"): name for name, (_, config_class) in BUILT_IN.items()}
families = FamilyRegistry("model family", ENTRY_POINTS)


def _unknown(name: str, known: list[str]) -> UnsupportedError:
    near = difflib.get_close_matches(name[:60].lower(), known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UnsupportedError(
        f"model_type {shown(name)} is not modelled; {hint}known: {', '.join(known)}; "
        f"register another family with an entry point of the group {ENTRY_POINTS!r}"
    )
