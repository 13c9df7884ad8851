"""The estimate and its plot say what the report says."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.reading import read_model
from simulator.roles import Phase
from studies.estimate import Estimate, Verdict, estimate
from studies.options import TrainingOptions
from studies.plots import COLOURS, plot_timeline, timeline_info


def small(**options) -> Estimate:
    return estimate(read_model("gpt2"), "a100-80", TrainingOptions(**{"seq_len": 64, **options}))


def test_every_role_has_a_colour():
    from simulator.roles import Role

    assert set(COLOURS) == set(Role)
    assert len(set(COLOURS.values())) == len(COLOURS)


@settings(max_examples=10, deadline=None)
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
