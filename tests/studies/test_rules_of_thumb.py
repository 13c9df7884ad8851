"""Rules of thumb beside an estimate: each says what its source says, is compared with its part of the peak, and why."""

from __future__ import annotations

import json

import pytest

from simulator.reading import read_model
from studies.cli.main import run
from studies.estimate import estimate
from studies.options import TrainingOptions


def rules(model="llama-3.2-1b", gpus="a100-80", **options):
    result = estimate(read_model(model), gpus, TrainingOptions(**{"seq_len": 64, **options}))
    return {rule.name: rule for rule in result.rules_of_thumb}, result.report


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "4 GB per billion"), ("bf16", "2 GB per billion")])
def test_weights(dtype, name):
    found, report = rules(dtype=dtype)
    assert found[name].says_bytes == int(name[0]) * report.parameters
    assert found[name].why == "they agree"


def test_training_states_by_regime():
    """Pure bf16 keeps 8 bytes per parameter, fp32 16; the 18 bytes are met by neither."""
    found, report = rules(dtype="bf16", seq_len=16)
    assert found["8 GB per billion"].why == "they agree"
    assert "bfloat16" in found["16 B per parameter"].why
    found, report = rules(dtype="fp32", seq_len=16)
    assert found["16 B per parameter"].why == "they agree"
    assert found["18 B per parameter"].says_bytes == 18 * report.parameters
    assert "fp32" in found["18 B per parameter"].why


def test_activations_of_the_papers_layer():
    """34 s b h + 5 a s^2 b for each layer, at two lengths and batches; checkpointing and flash attention say less."""
    for batch, length in ((1, 32), (3, 64)):
        found, report = rules(micro_batch=batch, seq_len=length)
        model, rule = report.model, found["s b h (34 + 5 a s / h)"]
        heads = model.layers[0].attention.heads
        each = 34 * length * batch * model.hidden + 5 * heads * length * length * batch
        assert rule.says_bytes == len(model.layers) * each
    found, _ = rules(micro_batch=8, seq_len=1024, dtype="bf16", checkpointing="full")
    rule = found["s b h (34 + 5 a s / h)"]
    assert rule.simulated_bytes < rule.says_bytes / 10
    assert "recomputed" in rule.why


REASONS = {
    "another optimizer": ({"optimizer": "sgd"}, "16 B per parameter", "Adam, not sgd"),
    "autocast": ({"dtype": "amp-bf16"}, "18 B per parameter", "temporary"),
    "fp32 for pure bf16": ({"dtype": "fp32"}, "8 GB per billion", "no fp32"),
    "gradients come later": ({"dtype": "bf16", "seq_len": 4096}, "18 B per parameter", "not all gradients"),
    "no activations": ({"dtype": "bf16", "seq_len": 8}, "s b h (34 + 5 a s / h)", "no activation is alive"),
    "shards": ({"gpus": "8xa100-80", "strategy": ("fsdp2",)}, "4 GB per billion", "one rank of 8"),
}


@pytest.mark.parametrize("title", sorted(REASONS))
def test_why_they_differ(title):
    options, name, why = REASONS[title]
    assert why in rules(**options)[0][name].why


def test_text_and_json(capsys):
    command = ["estimate", "gpt2", "--gpus", "t4", "--seq-len", "8"]
    assert run(command) == 0
    assert "rules of thumb" in capsys.readouterr().out
    assert run([*command, "--no-rules-of-thumb"]) == 0
    assert "rules of thumb" not in capsys.readouterr().out
    assert run([*command, "--json"]) == 0
    for rule in json.loads(capsys.readouterr().out)["rules_of_thumb"]:
        assert rule["source"]
        assert rule["why"]
        assert type(rule["says_bytes"]) is int
