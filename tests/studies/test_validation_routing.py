"""Experts in a loop against real PyTorch code, and what their routing may change.

Recorded with torch 2.13.0 and transformers 5.23.0 on CPU tensors: fake ones do not know how many rows an expert gets;
routers were made to choose evenly, or to give the first expert so many times the mean.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.errors import UsageError
from simulator import Training, simulate
from simulator.blocks.expert_loop import route
from simulator.reading import read_model
from studies.estimate import estimate
from studies.options import TrainingOptions
from studies.validation import validate_oracle
from tests.recorded import assert_exact

CASES = Path(__file__).parents[1] / "data" / "oracle" / "expert_loop.jsonl"


def test_peaks_and_phases():
    assert_exact(validate_oracle(CASES).rows)


@given(tokens=st.integers(1, 5000), experts=st.integers(1, 300), imbalance=st.floats(1, 400), chosen=st.integers(1, 12))
def test_no_routed_token_is_lost(tokens, experts, imbalance, chosen):
    chosen = min(chosen, experts)
    routing = route(tokens, chosen, experts, imbalance)
    rows = [routing.most, *[routing.each] * (routing.turns - 2), routing.last][: routing.turns]
    assert sum(rows) == tokens * chosen
    assert 1 <= routing.turns <= experts
    assert min(rows) >= 1
    assert routing.most <= tokens


def test_more_experts_cost_parameters_and_no_time():
    """The loop is built in as few turns for 128 experts as for 8."""
    model = read_model("qwen3-30b-a3b")
    reports = [simulate(model, Training(seq_len=512, experts=way)) for way in ("eager", "grouped_mm")]
    assert reports[0].parameters == reports[1].parameters
    assert len(reports[0].plan.graph.ops) < 4 * len(reports[1].plan.graph.ops)


def test_the_band_goes_from_even_to_the_most_uneven_routing():
    options = TrainingOptions(experts="eager", seq_len=4096, optimizer="sgd")
    result = estimate(read_model("mixtral-8x7b-v0.1"), "1x80GiB", options)
    assert result.routing is not None
    assert result.routing.even == result.peak.nbytes
    assert result.routing.even < result.routing.worst
    assert result.to_json_dict()["routing"]["imbalance"] == 4


def test_grouped_products_have_no_band():
    result = estimate(read_model("mixtral-8x7b-v0.1"), "1x80GiB", TrainingOptions(seq_len=64))
    assert result.routing is None
    with pytest.raises(UsageError, match="'expert_imbalance' changes no size with experts grouped_mm"):
        Training(expert_imbalance=1.5)
