"""The plot says what the report says, and its file is checked before anything is simulated."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.errors import UsageError
from simulator.reading import read_model
from simulator.roles import Phase
from studies.estimate import Estimate, estimate
from studies.options import TrainingOptions
from studies.plots import COLOURS, check_target, plot_timeline, timeline_info


def small(**options) -> Estimate:
    return estimate(read_model("gpt2"), "a100-80", TrainingOptions(**{"seq_len": 64, **options}))


def test_every_role_has_a_colour():
    from simulator.roles import Role

    assert set(COLOURS) == set(Role)
    assert len(set(COLOURS.values())) == len(COLOURS)


@settings(max_examples=10)
@given(st.integers(1, 4), st.sampled_from(["none", "full"]), st.integers(1, 3))
def test_plot_numbers_are_the_reports(batch, checkpointing, accumulation):
    result = small(micro_batch=batch, checkpointing=checkpointing, gradient_accumulation=accumulation)
    info = timeline_info(result)
    assert info.peak[1] == result.peak.nbytes == info.total.max()
    assert (sum(info.series.values()) == info.total).all()
    at_peak = {role: int(values[info.peak[0]]) for role, values in info.series.items() if values[info.peak[0]]}
    assert at_peak == result.peak.by_role
    assert [span[0] for span in info.spans] == sorted(span[0] for span in info.spans)  # cold before steady
    assert info.spans[0][2] == 0
    assert info.spans[-1][3] == len(info.total) - 1


def test_the_drawing_says_what_it_leaves_out():
    """Of many micro-batches one, and two of those that run alike; of a pipeline that waits for all nothing."""
    assert [timeline_info(small(gradient_accumulation=n)).drawn for n in (3, 9)] == ["", "3 of 9 micro-batches"]

    def stages(schedule):
        options = TrainingOptions(seq_len=16, gradient_accumulation=64, pp=4, schedule=schedule)
        return timeline_info(estimate(read_model("llama-3.2-1b"), "4xh100", options)).drawn

    assert (stages("1f1b"), stages("zb_h1")) == ("without 51 turns that run alike", "")


def test_a_long_timeline_keeps_its_peak():
    result = estimate(read_model("llama-3.1-70b"), "h100", TrainingOptions(dtype="bf16"))
    info = timeline_info(result)
    assert len(info.total) <= 4000
    assert info.total.max() == result.peak.nbytes


def test_the_drawing_shows_peak_capacity_and_phases():
    from matplotlib.figure import Figure

    ax = Figure().add_subplot()
    result = small()
    assert plot_timeline(timeline_info(result), ax) is ax
    texts = " ".join(text.get_text() for text in ax.texts)
    for expected in ("peak", "capacity", "cold step", "steady step", Phase.BACKWARD.value):
        assert expected in texts


def test_the_legend_is_ordered_like_the_stack():
    from matplotlib.figure import Figure

    info = timeline_info(small())
    legend = plot_timeline(info, Figure().add_subplot()).get_legend()
    named = [text.get_text().split("  ", 1)[1].strip() for text in legend.get_texts()]
    top_down = [role.value for role in reversed(info.series)]
    assert named == [role for role in top_down if role in named]
    assert len(named) > 3


def test_the_numbers_of_the_legend_line_up():
    from matplotlib.figure import Figure

    huge = estimate(read_model("llama-3.1-405b"), "h100", TrainingOptions(dtype="bf16"))
    legend = plot_timeline(timeline_info(huge), Figure().add_subplot()).get_legend()
    assert len({text.get_text().index("  ") for text in legend.get_texts()}) == 1


@pytest.mark.parametrize("name", ["x.gif", "x", "", "no/such/folder/x.png", "a" * 300 + ".png", "folder.png"])
def test_a_path_that_cannot_be_drawn_to_is_one_line(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match="'plot'") as caught:
        check_target(str(tmp_path / name), force=True)
    assert "\n" not in str(caught.value)


def test_a_path_that_may_not_be_written_is_known_before_simulating(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(UsageError, match="Permission denied"):
        check_target(str(tmp_path / "x.png"), force=False)


def test_checking_a_path_leaves_the_folder_as_it_was(tmp_path):
    assert check_target(str(tmp_path / "new.png"), force=False) == tmp_path / "new.png"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "old.png").write_text("mine")
    check_target(str(tmp_path / "old.png"), force=True)
    assert (tmp_path / "old.png").read_text() == "mine"
