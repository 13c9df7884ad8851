"""Float8 linear layers against torchao's own, and against what they must not change."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.reading import read_model
from simulator.roles import Role
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.deepspeed.zero3 import DeepSpeedZero3
from strategies.float8 import Float8
from strategies.tensor_parallel import TensorParallel
from studies.cli.main import run
from studies.validation import validate_oracle
from tests.strategies import model_specs, trainings, uniform_llama

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "float8.jsonl"


class TestTensorwise(StrategyContract):
    strategy = Float8()


class TestRowwise(StrategyContract):
    strategy = Float8("rowwise")


def test_peaks_of_torchao():
    """Recorded with torchao 0.18 and torch 2.13 on fake CUDA tensors, all linear layers but the head converted."""
    rows = validate_oracle(RECORDED).rows
    assert [row.name for row in rows if row.error_pct != 0] == []
    assert [row.name for row in rows if row.phase_expected != row.phase_simulated] == []


@settings(max_examples=15)
@given(
    model=model_specs(families=("llama", "gemma2", "qwen3", "mistral")),
    training=trainings(),
    recipe=st.sampled_from(["tensorwise", "rowwise"]),
)
def test_weights_gradients_and_states_stay(model, training, recipe):
    """What outlives a step is what it was, and a step leaks nothing, in every regime."""
    training = attrs.evolve(training, micro_batch=2, seq_len=16)
    try:
        before, after = (simulate(model, training, strategies) for strategies in ([], [Float8(recipe)]))
    except UnsupportedError:
        assume(False)
    assert before.parameters == after.parameters
    assert before.steady.end_bytes == after.steady.end_bytes == after.steady.start_bytes
    assert before.steady.by_role[Role.PARAMETER] == after.steady.by_role[Role.PARAMETER]


def test_eager_float8_costs_memory():
    """Its casts pass through fp32, so without compilation the peak of a long sequence rises."""
    training = Training(micro_batch=2, seq_len=512, weights=BF16)
    plain, low = (simulate(uniform_llama(2), training, strategies) for strategies in ([], [Float8()]))
    assert low.steady.nbytes >= plain.steady.nbytes
    names = {op.name for op in low.plan.graph.ops}
    assert "_scaled_mm.default" in names
    assert "mm.default" in names, "the head is not converted"


def test_layers_with_odd_sides_stay():
    odd = attrs.evolve(uniform_llama(1), hidden=40)
    report = simulate(odd, Training(micro_batch=2, seq_len=16), [Float8()])
    assert "_scaled_mm.default" not in {op.name for op in report.plan.graph.ops}


def test_it_goes_with_replicas_and_recomputation():
    training = Training(micro_batch=2, seq_len=64, weights=FP32)
    mesh = Mesh(dp_replicate=2)
    assert simulate(uniform_llama(3), training, [Float8("rowwise"), FullCheckpointing(), Ddp()], mesh=mesh).peak.nbytes


@pytest.mark.parametrize(
    ("strategies", "options", "error", "problem"),
    [
        ([Float8()], {"seq_len": 9}, UsageError, "micro-batch x seq-len must be a multiple of 16, not 9"),
        ([Float8()], {"implementation": "torchtitan"}, UnsupportedError, "implementation 'transformers' only"),
        ([Float8(), DeepSpeedZero3()], {}, UnsupportedError, "by ZeRO-3 is not modelled"),
        ([TensorParallel(), Float8()], {}, UnsupportedError, "sharded along 'tp'"),
    ],
)
def test_refusals(strategies, options, error, problem):
    zero = any(isinstance(strategy, DeepSpeedZero3) for strategy in strategies)
    mesh = Mesh(dp_shard=2) if zero else Mesh(tp=2)
    with pytest.raises(error, match=problem):
        simulate(uniform_llama(2), Training(**{"seq_len": 16, "weights": BF16, **options}), strategies, mesh=mesh)


def test_families_without_plain_linear_layers():
    for name in ("gpt2", "falcon-7b"):
        with pytest.raises(UnsupportedError, match=r"have no plain nn\.Linear"):
            simulate(read_model(name), Training(seq_len=16, attention="eager"), [Float8()])


def test_the_command_line(capsys):
    estimate = ["estimate", "smollm2-135m", "--gpus", "h100-80", "--seq-len", "64", "--dtype", "bf16"]
    assert run([*estimate, "--float8", "rowwise"]) == 0
    assert "float8 rowwise: run eagerly" in capsys.readouterr().out
    assert run([*estimate, "--float8", "blockwise"]) == 2
    assert "no recipe named 'blockwise'" in capsys.readouterr().err
