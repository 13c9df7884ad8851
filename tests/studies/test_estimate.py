"""The estimate says what the report says, and every assumption it rests on."""

from __future__ import annotations

import numpy as np

from simulator.reading import read_model
from studies.estimate import Estimate, Verdict, estimate
from studies.options import TrainingOptions


def small(**options) -> Estimate:
    return estimate(read_model("gpt2"), "a100-80", TrainingOptions(**{"seq_len": 64, **options}))


def test_groups_of_layers_cover_the_model():
    result = small()
    layers = [i for g in result.layers if g.first is not None for i in range(g.first, g.last + 1)]
    assert layers == list(range(12))
    assert sum(group.count * group.nbytes_each for group in result.layers) == result.peak.nbytes


def test_verdicts():
    peak = small().peak.nbytes
    model = read_model("gpt2")
    options = TrainingOptions(seq_len=64)
    tight = estimate(model, f"{peak + 1}B", options)
    assert tight.verdict is Verdict.FITS
    assert estimate(model, f"{peak - 1}B", options).verdict is Verdict.DOES_NOT_FIT
    assert estimate(model, f"{peak + 1}B", options, "1KiB").verdict is Verdict.TOO_LITTLE_HEADROOM
    assert tight.headroom == 1


def test_assumptions_name_every_option_left_out():
    assumed = " ".join(small().assumptions)
    for option in ("--task", "--dtype", "--optimizer", "--micro-batch", "--attention", "--checkpointing", "--torch"):
        assert option in assumed
    assert "--seq-len" not in assumed
    assert isinstance(small().report.timeline().total, np.ndarray)


def test_a_default_that_depends_on_the_family_says_why():
    assumed = " ".join(estimate(read_model("gemma-2-2b"), "h100", TrainingOptions(dtype="bf16")).assumptions)
    assert "--attention eager (gemma2's own default" in assumed
    assert "own default" not in " ".join(small().assumptions)


def test_a_torch_newer_than_the_newest_compared_is_an_assumption():
    assert any("2.20 behaves as 2.13" in line for line in small(torch="2.20").assumptions)
    assert not any("behaves as" in line for line in small(torch="2.13").assumptions)


def test_the_workload_is_named_whole():
    workload = small(dtype="amp-bf16", micro_batch=2, gradient_accumulation=3, checkpointing="full").workload
    parts = ("autocast bfloat16", "micro-batch 2 x 64 tokens", "3 per step", "sdpa", "adamw (foreach)", "full checkp")
    assert [part for part in parts if part not in workload] == []


def test_json_holds_the_whole_workload_and_the_exit_code():
    data = small(dtype="amp-bf16", optimizer="sgd,momentum=0.9").to_json_dict()
    assert data["training"]["weights"] == "float32"
    assert data["training"]["autocast"] == "bfloat16"
    assert data["training"]["optimizer"]["momentum"] == 0.9
    assert data["exit_code"] == 0
    assert sum(group["total_bytes"] for group in data["by_layer"]) == data["peak_bytes"]
