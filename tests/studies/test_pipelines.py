"""``vramsim estimate --pp``: every rank is simulated, and the highest one speaks for all."""

from __future__ import annotations

import json

import pytest

from studies.cli.main import run

COMMAND = "estimate llama-3.1-8b --gpus 4xh100-80 --pp 4 --dtype bf16 --seq-len 512 --gradient-accumulation 8"


def estimated(capsys, more: str = "") -> tuple[int, dict]:
    code = run([*COMMAND.split(), *more.split(), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_every_rank_is_told(capsys):
    code, data = estimated(capsys)
    ranks = {each["pipeline_rank"]: each for each in data["ranks"]}
    assert code == 0
    assert sorted(ranks) == [0, 1, 2, 3]
    assert [ranks[rank]["in_flight"] for rank in range(4)] == [4, 3, 2, 1]
    assert [ranks[rank]["layers"] for rank in range(4)] == [[[0, 7]], [[8, 16]], [[17, 24]], [[25, 31]]]
    assert data["peak_bytes"] == max(each["peak_bytes"] for each in data["ranks"])
    assert data["pipeline"]["worst_rank"] == data["ranks"][0]["pipeline_rank"]
    assert data["pipeline"]["layers_of_stages"] == [8, 9, 8, 7]
    assert data["model"]["layers"] == 32


def test_the_highest_rank_decides(capsys):
    """A card that most ranks fit on is too small when one of them does not."""
    _, data = estimated(capsys)
    peaks = sorted(each["peak_bytes"] for each in data["ranks"])
    between = (peaks[-1] + peaks[-2]) // 2
    arguments = COMMAND.replace("4xh100-80", f"4x{between // 2**20}MiB").split()
    assert run(arguments) == 3
    assert "does not fit" in capsys.readouterr().out


def test_text_has_a_line_for_each_rank(capsys):
    assert run([*COMMAND.split(), "--schedule", "zbv", "--gradient-accumulation", "512"]) == 0
    text = capsys.readouterr().out
    assert "pipeline zbv on pp 4" in text
    assert "0, 7    0-3, 29-31" in text
    assert text.count("highest\n") == 1
    assert "--pp-split 4,5,4,4,4,4,4,3" in text


def test_layers_are_those_of_the_whole_model(capsys):
    _, data = estimated(capsys, "--schedule gpipe --pp-split 5,5,5,17")
    assert data["pipeline"]["worst_rank"] == 3
    named = [group["layers"] for group in data["by_layer"] if group["layers"].startswith("layer")]
    assert all(int(name.split()[1].split("-")[0]) >= 15 for name in named)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--pp 3", "'pp' must divide the 4 GPUs: 3; the nearest that work: 2, 4"),
        ("--pp-split 8,8,8,9", "'pp-split' must add up to the model's 32 layers: 8,8,8,9 = 33"),
        ("--pp-split 8,8,x", "'pp-split' must be the layers of each stage"),
        ("--schedule spiral", "no schedule named 'spiral'"),
        ("--schedule dualpipe", "take dualpipev or zbv"),
        ("--virtual-stages 0 --schedule interleaved", "'virtual-stages' must be a whole number from 1 to 64: 0"),
        ("--virtual-stages 9 --schedule interleaved", "'pp' makes 36 stages of the model's 32 layers"),
        ("--pp 1 --gpus h100-80 --schedule gpipe", "'schedule' changes nothing without a pipeline"),
        ("--pp 2", "must say how 2 data-parallel ranks share the work (pp 2 x dp_replicate 2)"),
    ],
)
def test_wrong_words_are_one_line(capsys, more, said):
    code = run([*COMMAND.split(), *more.split()])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert said in error
