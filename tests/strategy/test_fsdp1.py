"""FSDP1: recorded peaks, the contract in several shapes, and what must hold over all ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.plan import apply, make_plan
from simulator.report import count_parameters
from simulator.roles import Role
from simulator.workload import Optimizer
from strategies.contract import StrategyContract
from strategies.fsdp1 import NO_SHARD, SHARD_GRAD_OP, Fsdp1
from studies.validation import read_cases, validate_oracle
from tests.strategies import model_specs, uniform_llama
from tests.strategy.residents import persistent
from tests.strategy.test_recorded_ranks import stream_peaks

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "fsdp1.jsonl"


class TestFsdp1(StrategyContract):
    strategy = Fsdp1(param_dtype=BF16, reduce_dtype=FP32, forward_prefetch=True, sync="last")
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


class TestFsdp1OriginalParameters(StrategyContract):
    strategy = Fsdp1(sharding_strategy=SHARD_GRAD_OP, use_orig_params=True, backward_prefetch="post", sync="last")
    mesh = Mesh(dp_shard=3)


class TestFsdp1Root(StrategyContract):
    strategy = Fsdp1(wrap="root", use_orig_params=True, sync="every", param_dtype=BF16)
    mesh = Mesh(dp_shard=5)


class TestFsdp1NotSharded(StrategyContract):
    strategy = Fsdp1(sharding_strategy=NO_SHARD, param_dtype=BF16, forward_prefetch=True)
    mesh = Mesh(dp_shard=2)


def test_recorded_peaks_are_met_to_the_byte():
    """Cold and steady peaks, their phases, and bytes by role where the recorder tells them apart."""
    by_role = {line["name"] for line in read_cases(RECORDED) if "peak_by_category" in line}
    validation = validate_oracle(RECORDED)
    assert len(validation.rows) >= 100
    for row in validation.rows:
        assert row.simulated_bytes == row.expected_bytes, (row.name, row.reason)
        assert row.phase_simulated == row.phase_expected
        if row.name.split(":")[0] in by_role:
            assert not any(row.role_errors_pct.values()), (row.name, row.role_errors_pct)


@pytest.mark.parametrize(
    "line", [line for line in read_cases(RECORDED) if "per_stream_peak" in line], ids=lambda line: line["name"]
)
def test_streams_are_exact(line):
    """Blocks never move between streams, so reserved memory needs each stream's own peak."""
    assert stream_peaks(line) == Counter(line["per_stream_peak"])


@settings(max_examples=15)
@given(model=model_specs(max_layers=4), ranks=st.integers(2, 5), wrap=st.sampled_from(("layer", "root")))
def test_ranks_together_hold_every_weight_once(model, ranks, wrap):
    """Flat shards add up to the weights and padding; with the original parameters, states to exactly the weights."""
    training = Training(micro_batch=1, seq_len=8, attention="eager", weights=FP32, optimizer=Optimizer(name="adam"))
    totals = {Role.PARAMETER: 0, Role.OPTIMIZER_STATE: 0}
    for rank in range(ranks):
        plan = make_plan(model, training, mesh=Mesh(dp_shard=ranks), rank=rank)
        held = persistent(apply(plan, [Fsdp1(wrap=wrap, use_orig_params=True)]))
        for role in totals:
            totals[role] += held[role]
    weights = 4 * count_parameters(make_plan(model, training))
    assert totals[Role.OPTIMIZER_STATE] == 2 * weights
    units = 1 if wrap == "root" else 1 + len(model.layers)
    aligned = 3 * len(make_plan(model, training, unrolled=True).graph.parameters)  # each to a multiple of four elements
    assert weights <= totals[Role.PARAMETER] <= weights + 4 * (aligned + units * ranks)


def test_units_need_less_than_the_whole_model():
    """FULL_SHARD needs less than SHARD_GRAD_OP, and that less than no sharding."""
    training = Training(micro_batch=1, seq_len=16)
    peaks = [
        simulate(uniform_llama(12), training, [Fsdp1(sharding_strategy=name)], mesh=Mesh(dp_shard=4)).peak.nbytes
        for name in ("full_shard", SHARD_GRAD_OP, NO_SHARD)
    ]
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == len(peaks)


@pytest.mark.parametrize(
    ("strategy", "mesh", "training", "hint"),
    [
        (Fsdp1(), Mesh(dp_shard=2, dp_replicate=2), Training(), "hybrid_shard"),
        (Fsdp1(sharding_strategy="hybrid_shard"), Mesh(dp_shard=2), Training(), "hybrid_shard"),
        (Fsdp1(), Mesh(dp_shard=2), Training(optimizer=Optimizer(name="adafactor")), "adafactor"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(strategy, mesh, training, hint):
    with pytest.raises((UsageError, UnsupportedError), match=hint) as caught:
        apply(make_plan(uniform_llama(2), training, mesh=mesh), [strategy])
    assert "\n" not in str(caught.value)


def test_a_rank_that_is_not_there_is_refused():
    plan = attrs.evolve(make_plan(uniform_llama(2), Training(), mesh=Mesh(dp_shard=2)), rank=2)
    with pytest.raises(UsageError, match="rank"):
        apply(plan, [Fsdp1()])


def test_low_precision_gradients_need_an_optimizer_that_takes_them():
    plan = make_plan(uniform_llama(2), Training(), mesh=Mesh(dp_shard=2))
    with pytest.raises(UnsupportedError, match="keep_low_precision_grads"):
        apply(plan, [Fsdp1(param_dtype=BF16, keep_low_precision_grads=True)])
