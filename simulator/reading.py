"""From what a user names, a file, a folder, a preset or a stream, to a `ModelSpec`."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import attrs

from hardware.errors import UsageError
from simulator.families import Family, families
from simulator.families.reader import ConfigReader as ConfigReader
from simulator.limits import shown
from simulator.model import ModelSpec
from simulator.presets import find_preset, preset_config, unknown_preset

STDIN = "-"
CONFIG_FILE = "config.json"
_LARGEST_FILE = 2**24
"""Bytes. The largest published config.json is far below 1 MiB; a file above this is something else."""

#: Formats that only pack the published file: a framework unpacks them to the dtype it is asked for (transformers
#: quantizers/auto.py, those with ``dequantize``; "modelopt" is how NVIDIA's exporter names its own).
_PACKED = ("compressed-tensors", "fbgemm_fp8", "fp8", "modelopt", "mxfp4")
# Keys that change memory in any family; values that leave it as it is; what to do about others.
_NOT_MODELLED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("per_layer_config", (None,), "remove it"),
    ("pruned_heads", (None, {}), "remove it and give the head counts that are left"),
    ("output_attentions", (False, None), "set it to false"),
    ("output_hidden_states", (False, None), "set it to false"),
    ("is_encoder_decoder", (False, None), "give a decoder-only model"),
)


def read_model(source: str) -> ModelSpec:
    """The model that `source` names: a config.json, a folder with one, a preset, or ``-`` for stdin.

    Raises:
        UsageError: in one line, if nothing of that name exists or its config is wrong.
    """
    if source == STDIN:
        return spec_from_config(_parsed(_stdin(), "stdin"), "stdin")
    path = _existing(source)
    preset = find_preset(source)
    if path is None and preset is not None:
        return _spec(_family(preset_config(preset)), preset_config(preset), preset, complete=False)
    if path is None:
        raise _missing(source)
    return spec_from_config(_parsed(_file(path), str(path)), _model_name(path))


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The model of a parsed config.json; `model_type`, or else `architectures`, decides the family.

    Sizes that make the model must be there; other keys may be missing, and each default that
    stands in for one is a line of the spec's `assumptions`.
    """
    if not isinstance(config, Mapping):
        raise UsageError(f"{_printable(name)}: a config must be a JSON object, not {shown(config)}")
    return _spec(_family(config), config, name, complete=True)


def spec_from_class(config_class: str, values: Mapping[str, Any], name: str) -> ModelSpec:
    """The model that ``config_class(**values)`` describes, e.g. of ``GPT2Config``: defaults for all else."""
    return _spec(families.find(config_class), values, name, complete=False)


def _spec(family: Family, config: Mapping[str, Any], name: str, *, complete: bool) -> ModelSpec:
    config_class = family.config_class or family.name
    reader = ConfigReader(config, _printable(name), family.name, config_class, family.aliases, complete)
    for key, harmless, way_out in _NOT_MODELLED:
        reader.refuse(key, harmless, way_out)
    packed = _packed(reader)
    try:
        spec = family.read(reader)
    except ValueError as error:
        # What a family builds from the placeholder of a wrong key may fail: the wrong key is the news.
        reader.raise_problems()
        raise UsageError(f"{reader.name}: {error} (correct the config of this {family.name} model)") from error
    reader.raise_problems()
    beside = (*_predictions(reader), *_beside(family, spec))
    predictors = sum(_predicted(reader).values())
    return attrs.evolve(spec, predictors=predictors, assumptions=(*packed, *reader.assumptions, *beside))


def _packed(config: ConfigReader) -> list[str]:
    """What is assumed of a file in a packed format; formats that a model is run in are refused."""
    given = config.values.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, Mapping) else None
    if method in _PACKED:
        return [f"quantization_config: the file is packed as {method}; weights are simulated in the dtype asked for"]
    config.refuse("quantization_config", (None,), "remove it to simulate the model in a plain dtype")
    return []


def _predicted(config: ConfigReader) -> dict[str, int]:
    """The keys that give a number of modules that predict further tokens (DeepSeek-V3, arXiv:2412.19437, 2.2)."""
    keys = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "num_mtp_layers")
    counts = {key: config.values.get(key) for key in keys}
    return {key: count for key, count in counts.items() if isinstance(count, int) and count > 0}


def _predictions(config: ConfigReader) -> list[str]:
    """What is said of them: transformers trains none."""
    return [
        f"{key} {count}: transformers' model has no such modules; they are left out unless --mtp trains some"
        for key, count in _predicted(config).items()
    ]


def _beside(family: Family, spec: ModelSpec) -> list[str]:
    """One line for each part of the checkpoint that the simulation leaves out."""
    if family.counted:
        return []
    return [f"{part.name}: its {part.parameters:,} parameters are counted, not simulated" for part in spec.parts]


def _family(config: Mapping[str, Any]) -> Family:
    for name in (config.get("model_type"), _first(config.get("architectures"))):
        if isinstance(name, str) and name:
            return families.find(name)
        if name is not None:
            raise UsageError(f"model_type must be a name such as 'llama', not {shown(name)}")
    raise UsageError(f"model_type is missing: add it; known: {', '.join(families.names())}")


def _first(architectures: object) -> object:
    return architectures[0] if isinstance(architectures, list) and architectures else None


def _existing(source: str) -> Path | None:
    """The file that `source` is or holds; none if there is none, so that it can be a preset's name."""
    path = Path(source)
    try:
        if path.is_dir():
            return _config_in(path)
        return path if path.exists() else None
    except OSError:  # a name too long for the file system, or a folder that may not be entered
        return None


def _config_in(folder: Path) -> Path | None:
    """Its config.json; none if a preset has the folder's name (the output of a run, say)."""
    if (folder / CONFIG_FILE).exists():
        return folder / CONFIG_FILE
    if find_preset(str(folder)) is None:
        raise UsageError(f"folder {str(folder)!r} holds no {CONFIG_FILE}: give a model's folder or the file itself")
    return None


def _missing(source: str) -> UsageError:
    """A name with a suffix or a path's first letters was meant as a file, any other as a preset."""
    if source.endswith(".json") or source.startswith(("/", ".", "~")):
        return UsageError(f"no file named {source!r}: check the path")
    return unknown_preset(source)


def _model_name(path: Path) -> str:
    return path.resolve().parent.name if path.name == CONFIG_FILE else path.stem


def _file(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return _bytes(stream, str(path))
    except OSError as error:
        raise UsageError(f"cannot read {str(path)!r}: {error.strerror}; check the path and its permissions") from error


def _stdin() -> bytes:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise UsageError("stdin is closed: pipe a config.json into the command or give its path")
    try:
        return _bytes(stream, "stdin")
    except OSError as error:
        raise UsageError(f"cannot read stdin: {error.strerror}; give the path of a config.json") from error


def _bytes(stream: BinaryIO, source: str) -> bytes:
    data = stream.read(_LARGEST_FILE + 1)
    if len(data) > _LARGEST_FILE:
        raise UsageError(f"{source!r} is larger than {_LARGEST_FILE} bytes: give a {CONFIG_FILE}, not a checkpoint")
    return data


def _parsed(data: bytes, source: str) -> Any:
    """The JSON value in `data`; every way in which it can be none of that is a `UsageError`."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source!r} is not text (byte {error.start}): give a {CONFIG_FILE}") from error
    if not text.strip():
        raise UsageError(f"{source!r} is empty: give a {CONFIG_FILE}")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}"
        raise UsageError(f"{source!r} is not valid JSON: {error.msg} at {place}; is the file complete?") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source!r} holds a number too long or lists too deep: give a {CONFIG_FILE}") from error


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)
