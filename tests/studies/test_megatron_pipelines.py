"""Megatron-LM's pipelines as people ask for them: ``--implementation megatron --pp N``."""

from __future__ import annotations

import json

import pytest

from studies.cli.main import run

ASKED = ["estimate", "llama-3.1-8b", "--implementation", "megatron", "--dtype", "bf16", "--gpus", "8xH100-80GB"]
ASKED += ["--strategy", "megatron_distributed_optimizer", "--gradient-accumulation", "4", "--json"]


def answer(capsys, *more: str) -> dict:
    assert run([*ASKED, *more]) in (0, 3, 4)
    return json.loads(capsys.readouterr().out)


def test_every_rank_of_a_pipeline_is_simulated(capsys):
    found = answer(capsys, "--pp", "4")
    assert found["pipeline"]["schedule"] == "1f1b"
    assert found["pipeline"]["layers_of_stages"] == [8, 8, 8, 8]
    assert sorted(each["pipeline_rank"] for each in found["ranks"]) == [0, 1, 2, 3]
    assert {each["count"] for each in found["ranks"]} == {2}
    assert any("Megatron-LM's loop" in line for line in found["assumptions"])


def test_several_stages_of_a_rank_are_interleaved(capsys):
    found = answer(capsys, "--pp", "4", "--virtual-stages", "2", "--tp", "2")
    assert (found["pipeline"]["schedule"], found["pipeline"]["virtual_stages"]) == ("interleaved_1f1b", 2)
    assert all(len(each["stages"]) == 2 for each in found["ranks"])


@pytest.mark.parametrize("more", [["--schedule", "gpipe"], ["--schedule", "interleaved"], ["--pp-split", "1,31"]])
def test_other_loops_and_splits_are_refused(capsys, more):
    assert run([*ASKED, "--pp", "4", *more]) == 2
    assert "must be" in capsys.readouterr().err
