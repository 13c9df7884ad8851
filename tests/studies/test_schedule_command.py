"""``vramsim schedule``: counts as text and JSON, the chart, and one-line refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings

from simulator.schedules import SCHEDULES, schedule
from simulator.schedules.replay import replay
from studies.cli.main import run
from studies.schedule_plot import plot_schedule
from studies.schedules import drawable, idle_share, schedule_data
from tests.strategies import schedules


def call(capsys, *arguments):
    code = run(["schedule", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_has_a_row_for_each_rank(capsys):
    code, out, err = call(capsys, "interleaved_1f1b", "--pp", "4", "--microbatches", "8", "--chunks", "2")
    assert (code, err) == (0, "")
    assert "groups of 4" in out
    assert [line.split()[:4] for line in out.splitlines()[2:]] == [
        ["0", "0,", "4", "11"], ["1", "1,", "5", "9"], ["2", "2,", "6", "7"], ["3", "3,", "7", "5"],
    ]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_json_says_the_same(capsys, name):
    code, out, _ = call(capsys, name, "--pp", "4", "--micro-batches", "12", "--json")
    data = json.loads(out)
    assert code == 0
    assert data == schedule_data(schedule(name, 4, 12))
    assert [row["rank"] for row in data["ranks"]] == [0, 1, 2, 3]
    assert sum(row["actions"] for row in data["ranks"]) == len(replay(schedule(name, 4, 12)).order)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dualpipe", "--pp", "5", "--microbatches", "20"], "'pp' of dualpipe must be even: 5"),
        (["1f1b", "--pp", "0", "--microbatches", "20"], "'pp' must be an integer from 1"),
        (["1f1d", "--pp", "4", "--microbatches", "20"], "no schedule named '1f1d'; did you mean '1f1b'"),
        (["1f1b", "--pp", "4", "--microbatches", "20", "--plot", "x.gif"], "'plot' must end in"),
        (["1f1b", "--pp", "16", "--microbatches", "9999", "--plot", "x.png"], "draw about 625 micro-batches"),
    ],
)
def test_a_refusal_is_one_line(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_chart_is_written(capsys, tmp_path):
    target = tmp_path / "chart.png"
    arguments = ("dualpipev", "--pp", "2", "--microbatches", "5", "--plot", str(target))
    assert call(capsys, *arguments)[0] == 0
    assert target.stat().st_size > 5000
    assert call(capsys, *arguments)[0] == 2  # it would overwrite


@settings(max_examples=10, deadline=None)
@given(schedules())
def test_the_chart_draws_every_action_once(s):
    from matplotlib.figure import Figure

    found = drawable(s)
    ax = plot_schedule(s, found, Figure().add_subplot())
    labelled = [drawn for drawn in ax.collections if not str(drawn.get_label()).startswith("_")]
    assert sum(len(drawn.get_paths()) for drawn in labelled) == len(found.order)
    for drawn in labelled:
        for path in drawn.get_paths():
            low, high = path.vertices[:, 1].min(), path.vertices[:, 1].max()
            assert np.floor(low + 0.5) == np.floor(high + 0.5)  # inside the row of one rank
    assert s.name in ax.get_title(loc="left")
    assert 0 <= idle_share(found) < 1
