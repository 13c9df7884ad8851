"""What vramsim knows by name: model presets, GPUs and strategies, as plain data."""

from __future__ import annotations

import sys
from typing import Any

import attrs

from hardware.gpus import all_gpus
from simulator.families import families
from simulator.model import ModelSpec
from simulator.plan import make_plan
from simulator.presets import preset_names, preset_source
from simulator.reading import read_model
from simulator.report import count_parameters
from simulator.workload import Training
from strategies import strategies
from studies.frameworks import PROFILES
from studies.parallelism import as_typed


def model_rows() -> list[dict[str, Any]]:
    """One object per preset: `id`, `params`, sizes and source; parameters are counted on the graph."""
    return [_model_row(name) for name in preset_names()]


def _model_row(name: str) -> dict[str, Any]:
    model = read_model(name)
    text, beside = parameters(model)
    return {
        "id": name,
        "params": text + beside,
        "params_text": text,
        "family": model.family,
        "layers": len(model.layers),
        "hidden": model.hidden,
        "vocab": model.vocab,
        "max_positions": model.max_positions,
        "source": preset_source(name),
    }


def parameters(model: ModelSpec) -> tuple[int, int]:
    """Parameters of the language model, counted on its graph where it has one, and of what stands beside it."""
    parts = {part.name: part.parameters for part in model.parts}
    if families.get(model.family).counted:
        text = parts.pop("text")
    else:
        text = count_parameters(make_plan(model, Training(attention="eager", seq_len=2)))
    return text, sum(parts.values())


def strategy_rows() -> list[dict[str, Any]]:
    """One object per strategy: `id`, mesh axis, summary, source and options with their defaults."""
    return [_strategy_row(name) for name in strategies.names()]


def _strategy_row(name: str) -> dict[str, Any]:
    factory = strategies.get(name)
    module = sys.modules[factory.__module__].__doc__ or ""
    summary, _, source = module.partition("\n\n")
    fields = attrs.fields(factory) if isinstance(factory, type) and attrs.has(factory) else ()
    return {
        "id": name,
        "axis": getattr(factory, "axis", None),
        "summary": " ".join(summary.split()),
        "source": " ".join(source.split()),
        "options": [_option_row(field) for field in fields if "help" in field.metadata],
    }


def _option_row(field: attrs.Attribute[Any]) -> dict[str, Any]:
    help_text, source = field.metadata["help"], field.metadata["source"]
    return {"name": field.name, "default": as_typed(field.default), "help": help_text, "source": source}


def gpu_rows() -> list[dict[str, Any]]:
    """One object per GPU: `id`, capacity in bytes with its evidence, source and confidence."""
    return [
        {
            "id": gpu.name,
            "product": gpu.product,
            "vendor": gpu.vendor,
            "capacity_low_bytes": gpu.capacity.low,
            "capacity_high_bytes": gpu.capacity.high,
            "capacity_basis": gpu.capacity.basis,
            "capacity_evidence": gpu.capacity.evidence,
            "source": gpu.source,
            "confidence": gpu.confidence,
        }
        for gpu in all_gpus()
    ]


def framework_rows() -> list[dict[str, Any]]:
    """One object per framework: `id`, version, defaults with their sources and where they apply, and notes."""
    return [
        {
            "id": name,
            "version": profile.version,
            "defaults": [
                {"option": each.typed, "where": each.where.text, "source": each.source} for each in profile.defaults
            ],
            "notes": [{"text": note.text, "where": note.where.text} for note in profile.notes],
        }
        for name, profile in PROFILES.items()
    ]
