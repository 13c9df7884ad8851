"""Published models shipped as config files, read when they are asked for.

The model ``org/name`` is the file ``org--name.json``; `index.csv` lists all with the public source
each was taken from.
"""

from __future__ import annotations

import csv
import difflib
import functools
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from hardware.errors import UsageError

_REDUNDANT_PREFIX = "meta-"
_REDUNDANT_SUFFIX = "-hf"


def preset_names() -> list[str]:
    """Every shipped model, e.g. ``meta-llama/Llama-2-7b-hf``, sorted without regard to case."""
    return list(_index())


def preset_source(name: str) -> str:
    """The public repository, commit and file that the preset `name` was taken from."""
    return _index()[name]


def preset_config(name: str) -> dict[str, Any]:
    """The parsed config of the preset `name`, one of `preset_names`."""
    config: dict[str, Any] = json.loads(_text(f"{name.replace('/', '--')}.json"))
    return config


def find_preset(name: str) -> str | None:
    """The preset that `name` or one of its short forms means, whatever its case; None if none does."""
    return _aliases().get(name.strip().lower())


def unknown_preset(name: str) -> UsageError:
    """One line for a `name` that is no file, no folder and no preset, with the nearest presets."""
    near = difflib.get_close_matches(name[:100].lower(), _aliases(), n=4, cutoff=0.6)
    models = list(dict.fromkeys(_aliases()[each] for each in near))[:3]
    hint = f"did you mean {' or '.join(models)}?" if models else f"known: {', '.join(preset_names())}"
    return UsageError(f"no file, folder or preset model named {name[:200]!r}; {hint}")


@functools.cache
def _index() -> dict[str, str]:
    return {row["id"]: row["source"] for row in csv.DictReader(_text("index.csv").splitlines())}


@functools.cache
def _aliases() -> dict[str, str]:
    return {short: name for name in _index() for short in short_names(name)}


def short_names(name: str) -> Iterator[str]:
    """The lower-case forms of a preset's `name`: in full, without its owner, without what adds nothing."""
    last = name.lower().rpartition("/")[2]
    yield from (name.lower(), last)
    yield last.removeprefix(_REDUNDANT_PREFIX).removesuffix(_REDUNDANT_SUFFIX)


def _text(file: str) -> str:
    return files(__name__).joinpath(file).read_text(encoding="utf-8")
