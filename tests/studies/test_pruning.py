"""The words of ``--prune``, and the report of what it saves."""

from __future__ import annotations

import json

import pytest

from hardware.errors import UsageError
from strategies.pruning import PruneChannels, PruneGroups, PruneHeads, PruneLayers
from studies.cli.main import run
from studies.pruning import parse_prunings

ESTIMATE = ["estimate", "smollm2-135m", "--gpus", "h100-80", "--seq-len", "64", "--dtype", "bf16"]


def test_words():
    texts = ["layers=2,5-7", "heads=3", "channels=25%@0,4-5", "channels=8@1"]
    expected = (PruneHeads(3), PruneChannels("25%", (0, 4, 5)), PruneChannels(8, (1,)), PruneLayers((2, 5, 6, 7)))
    assert parse_prunings(texts) == expected
    assert parse_prunings(["groups=1"]) == (PruneGroups(1),)
    assert parse_prunings([]) == ()


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (["heads"], "'prune' is written"),
        (["head=4"], "no structure to prune named 'head'; did you mean"),
        (["heads=four"], "an amount to prune"),
        (["layers=7-5"], "layers are written"),
        (["layers=x"], "layers are written"),
        (["heads=3@"], "layers are written"),
        (["hidden=3@1"], "'prune' hidden is one size for all layers: leave out '@1'"),
        (["hidden=3", "hidden=4"], "'prune' must name a structure once for each layer"),
        (["heads=3", "heads=1@2"], "'prune' must name a structure once for each layer"),
        (["layers=1", "layers=1-2"], "'prune' must name a structure once for each layer"),
    ],
)
def test_wrong_words(texts, problem):
    with pytest.raises(UsageError, match=problem):
        parse_prunings(texts)


def test_the_report_says_what_is_saved(capsys):
    assert run([*ESTIMATE, "--prune", "groups=1", "--prune", "layers=0-9", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    rows = {row.pop("name"): row for row in data["pruning"]}
    assert list(rows) == ["parameters", "weights", "gradients", "optimizer states", "peak"]
    assert rows["parameters"]["after_count"] == data["model"]["params"]
    assert rows["peak"]["after_bytes"] == data["peak_bytes"]
    assert all(row["saved_bytes"] > 0 for name, row in rows.items() if name != "parameters")
    weights = rows["weights"]
    assert weights["before_bytes"] - weights["after_bytes"] == weights["saved_bytes"]
    assert rows["optimizer states"]["before_bytes"] == 2 * weights["before_bytes"]
    assert "pruned: layers 0-9 of 30" in data["assumptions"]


def test_the_text_has_a_table_only_where_something_is_pruned(capsys):
    assert run([*ESTIMATE, "--prune", "channels=50%"]) == 0
    assert "what pruning saves" in capsys.readouterr().out
    assert run(ESTIMATE) == 0
    assert "what pruning saves" not in capsys.readouterr().out


def test_a_wrong_amount_is_one_line(capsys):
    assert run([*ESTIMATE, "--prune", "heads=2"]) == 2
    assert "'heads' to prune must be a multiple of 3, not 2 of 9: remove 3" in capsys.readouterr().err
