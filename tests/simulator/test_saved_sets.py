"""What one layer leaves alive after forward, storage by storage, against real PyTorch code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from simulator import simulate
from simulator.program import Leaf, Repeat, Seq, Walk, identity
from simulator.roles import Phase
from studies.validation import oracle_case

ORACLE = Path(__file__).parents[3] / "shared" / "oracle" / "single"
OWN = Path(__file__).parents[1] / "data" / "oracle" / "layers"
CLASSES = {"GPT2Config", "LlamaConfig", "Gemma2Config", "Gemma3TextConfig", "Phi3Config", "Qwen2Config", "Qwen3Config"}
CLASSES |= {"MixtralConfig", "Qwen3MoeConfig", "DeepseekV2Config"}
CLASSES |= {"OPTConfig", "GPTNeoXConfig", "BloomConfig", "GPTBigCodeConfig"}


def layer_files():
    """Every layer file of the simulated families: ours, and the shared ones where they are present."""
    found = sorted(OWN.glob("*.json"))
    models = _models()
    for path in sorted((ORACLE / "layers").glob("*.json")):
        case = json.loads(path.read_text())["case"]
        if case["model"] in models and not case["lora"]:
            found.append(path)
    return found


def _models():
    """Model name of the oracle -> its config line, for the simulated families."""
    models = {}
    cases = ORACLE / "cases.jsonl"
    for line in cases.read_text().splitlines() if cases.exists() else []:
        case = json.loads(line)
        if case["config_class"] in CLASSES and case["case"].get("model"):
            models.setdefault(case["case"]["model"], (case["config_class"], case["config"]))
    return models


def kept_by_middle_layer(report):
    """(bytes, dtype, op) of what the middle layer's forward makes and leaves alive."""
    node = report.program.cold
    bindings = report.program.bindings
    layers = [leaf for leaf in _layers(node) if leaf.steps[0].phase is Phase.FORWARD and leaf.steps[0].births]
    middle = layers[len(layers) // 2]
    kept = {}
    for step in (step for step in middle.steps if step.layer == 0):
        for reference in step.births:
            kept[identity(reference, 0)] = (
                int(reference.storage.size.nbytes(bindings)),
                reference.storage.dtype.name,
                step.name,
            )
        for reference in step.deaths:
            kept.pop(identity(reference, 0), None)
    return Counter(kept.values())


def _layers(node):
    """The straight run of each turn of a pattern, and of each layer where they follow no pattern."""
    if isinstance(node, Seq):
        return [found for part in node.parts for found in _layers(part)]
    if isinstance(node, Walk):
        return [leaf for leaf, _ in node.parts]
    if isinstance(node, Repeat) and node.first is not None and isinstance(node.body, Leaf):
        return [node.body]
    return []


@pytest.mark.parametrize("path", layer_files(), ids=lambda path: path.stem)
def test_saved_set_of_a_layer(path):
    stored = json.loads(path.read_text())
    case = dict(stored["case"])
    if "config_class" not in case:
        case["config_class"], case["config"] = _models()[case["model"]]
    model, training, strategies = oracle_case({"id": path.stem, "case": case, **case})
    expected = Counter((n, dtype, op) for n, op, _, _, dtype in stored["kept_in_middle_layer"])
    assert kept_by_middle_layer(simulate(model, training, strategies)) == expected
