"""Megatron's data parallelism: recorded peaks, the published bytes per parameter, totals over ranks."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.report import count_parameters
from simulator.roles import Role
from simulator.timeline import moments
from simulator.workload import Optimizer
from strategies.contract import StrategyContract
from strategies.megatron import MegatronDistributedOptimizer as Megatron
from studies.validation import validate_oracle
from tests.strategies import model_specs, uniform_llama
from tests.strategy.residents import persistent

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "megatron.jsonl"
FUSED = Optimizer(name="adamw", implementation="fused")
#: Roles of what Megatron keeps; a model's buffers are not among them.
KEPT = (Role.PARAMETER, Role.MASTER_WEIGHT, Role.OPTIMIZER_STATE, Role.BUCKET, Role.GRADIENT)


class TestMegatron(StrategyContract):
    strategy = Megatron(overlap_grad_reduce=True, bucket_size=5000)
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


class TestMegatronFused(StrategyContract):
    strategy = Megatron(gradient_accumulation_fusion=True)
    mesh = Mesh(dp_shard=2)


class TestMegatronWithoutDistributedOptimizer(StrategyContract):
    strategy = Megatron(use_distributed_optimizer=False, grad_reduce_in_fp32=False)
    mesh = Mesh(dp_shard=2)


def test_recorded_peaks_are_met_to_the_byte():
    """Cold and steady peaks of Megatron's own code, their phases, and bytes by role."""
    validation = validate_oracle(RECORDED)
    assert len(validation.rows) >= 20
    for row in validation.rows:
        assert row.simulated_bytes == row.expected_bytes, (row.name, row.reason)
        assert row.phase_simulated == row.phase_expected
        assert not any(row.role_errors_pct.values()), (row.name, row.role_errors_pct)


def bytes_per_parameter(weights, options, ranks, rank=0):
    """What the rank keeps between two steps, over the parameters of a model without padding."""
    model = uniform_llama(4)  # its weights and their sum are multiples of 64 and of 128 times the ranks, near enough
    training = Training(micro_batch=1, seq_len=8, weights=weights, optimizer=FUSED)
    plan = make_plan(model, training, mesh=Mesh(dp_shard=ranks), rank=rank)
    held = persistent(apply(plan, [Megatron(**options)]))
    return sum(held[role] for role in KEPT) / count_parameters(plan)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("weights", "in_fp32", "plain", "kept", "sharded"),
    [(FP16, False, 20, 4, 16), (BF16, True, 18, 6, 12), (FP32, True, 16, 8, 8)],
    ids=["fp16", "bf16", "fp32"],
)
def test_the_published_bytes_per_parameter_fall_out(ranks, weights, in_fp32, plain, kept, sharded):
    """docs/user-guide/features/dist_optimizer.md of Megatron-LM: 20 or 4 + 16/d, 18 or 6 + 12/d, 16 or 8 + 8/d."""
    options = {"grad_reduce_in_fp32": in_fp32}
    mean = sum(bytes_per_parameter(weights, options, ranks, rank) for rank in range(ranks)) / ranks
    assert mean == pytest.approx(kept + sharded / ranks, rel=0.01)
    without = bytes_per_parameter(weights, {**options, "use_distributed_optimizer": False}, ranks)
    assert without == pytest.approx(plain, rel=0.001)


@pytest.mark.parametrize(
    ("options", "sharded"),
    [
        ({}, 10),
        ({"store_param_remainders": False}, 12),
        ({"exp_avg_dtype": BF16, "exp_avg_sq_dtype": BF16}, 6),
    ],
)
def test_a_precision_aware_optimizer_lowers_what_is_sharded(options, sharded):
    """Sixteen bits of the main weight, moments as narrow as asked for (each with a scale of four bytes)."""
    options = {"use_precision_aware_optimizer": True, **options}
    mean = sum(bytes_per_parameter(BF16, options, 2, rank) for rank in range(2)) / 2
    assert mean == pytest.approx(6 + sharded / 2, rel=0.01)


def test_fused_accumulation_makes_no_gradients_of_linear_layers():
    """A dummy for each shape stays; the transient gradients of linear layers are not made."""
    training = Training(micro_batch=1, seq_len=8, weights=BF16, optimizer=FUSED)
    born = []
    for fusion in (False, True):
        plan = make_plan(uniform_llama(4), training, mesh=Mesh(dp_shard=2))
        program = lower(apply(plan, [Megatron(gradient_accumulation_fusion=fusion)]))
        made = [r.storage.label for m in moments(program.steady) for r in m.step.births]
        born.append({label for label in made if ".grad.mm.default" in label and "_proj" in label})
    assert len(born[1]) < len(born[0])  # what is left are gradients of the layers' inputs


@settings(max_examples=15)
@given(
    model=model_specs(max_layers=4),
    ranks=st.integers(1, 5),
    bucket_size=st.integers(1, 20000),
    wide=st.booleans(),
)
def test_ranks_together_update_every_weight_once(model, ranks, bucket_size, wide):
    """Main weights and moments of all ranks are those of the whole model, whatever the buckets."""
    training = Training(micro_batch=1, seq_len=8, attention="eager", weights=BF16, optimizer=FUSED)
    strategy = Megatron(overlap_grad_reduce=True, bucket_size=bucket_size, pad_buckets_for_high_nccl_busbw=wide)
    totals = dict.fromkeys(KEPT, Fraction(0))
    for rank in range(ranks):
        plan = make_plan(model, training, mesh=Mesh(dp_shard=ranks), rank=rank)
        held = persistent(apply(plan, [strategy]))
        totals = {role: totals[role] + held[role] for role in KEPT}
        assert held[Role.BUCKET] == 2 * held[Role.PARAMETER]
        assert held[Role.PARAMETER] % (2 * 128) == 0
    weights = count_parameters(make_plan(model, training))
    assert totals[Role.MASTER_WEIGHT] == 4 * weights
    assert totals[Role.OPTIMIZER_STATE] == 8 * weights
    assert totals[Role.PARAMETER] >= 2 * ranks * weights


@pytest.mark.parametrize(
    ("options", "training", "hint"),
    [
        ({"exp_avg_dtype": BF16}, Training(), "use_precision_aware_optimizer"),
        ({"use_precision_aware_optimizer": True}, Training(), "fused"),
        ({"use_precision_aware_optimizer": True, "use_distributed_optimizer": False}, Training(), "distributed"),
        ({}, Training(zero_grad="zero"), "zero_grad"),
        ({}, Training(optimizer=Optimizer(name="adafactor")), "adafactor"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(options, training, hint):
    with pytest.raises((UsageError, UnsupportedError), match=hint) as caught:
        apply(make_plan(uniform_llama(2), training, mesh=Mesh(dp_shard=2)), [Megatron(**options)])
    assert "\n" not in str(caught.value)
