"""ZeRO-3: peaks of real runs to the byte, the contract in several shapes, totals over ranks, the paper's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP16, FP32
from hardware.errors import UnsupportedError
from simulator import Mesh, Optimizer, Training, simulate
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.roles import Role
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.deepspeed.zero3 import DeepSpeedZero3
from strategies.deepspeed.zero3_gather import quantizer_groups
from tests.strategies import model_specs, uniform_llama
from tests.strategy.kept import kept

LINES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "oracle" / "deepspeed_zero3.jsonl").read_text().splitlines()
]
OPTIMIZERS = {
    "adamw_foreach": Optimizer(name="adamw", implementation="foreach"),
    "adamw_loop": Optimizer(name="adamw", implementation="for-loop"),
    "sgd": Optimizer(name="sgd", implementation="for-loop"),
}
FUSED = Optimizer(name="adamw", implementation="fused")
#: Options under which nothing is gathered before it is needed or kept longer.
FRUGAL = {
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}


class TestDefaults(StrategyContract):
    strategy = DeepSpeedZero3(reduce_bucket_size=3000)
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


class TestFrugal(StrategyContract):
    strategy = DeepSpeedZero3(reduce_bucket_size=1, reduce_scatter=False, sub_group_size=100, **FRUGAL)
    mesh = Mesh(dp_shard=3)


class TestPrefetching(StrategyContract):
    strategy = DeepSpeedZero3(
        reduce_bucket_size=9000,
        stage3_prefetch_bucket_size=4000,
        stage3_max_live_parameters=9000,
        stage3_max_reuse_distance=6000,
        stage3_param_persistence_threshold=40,
        contiguous_gradients=False,
        grad_accum_dtype=FP32,
    )
    mesh = Mesh(dp_shard=4)


class TestSecondaryPartitions(StrategyContract):
    strategy = DeepSpeedZero3(reduce_bucket_size=3000, zero_hpz_partition_size=2, stage3_max_reuse_distance=0)
    mesh = Mesh(dp_shard=4)


class TestQuantizedWeights(StrategyContract):
    strategy = DeepSpeedZero3(
        reduce_bucket_size=3000, zero_quantized_weights=True, stage3_param_persistence_threshold=100
    )
    mesh = Mesh(dp_shard=2)


class TestCheckpointed(StrategyContract):
    strategy = DeepSpeedZero3(reduce_bucket_size=3000, **FRUGAL)
    before = (FullCheckpointing(),)
    mesh = Mesh(dp_shard=4)


def recorded_model(config):
    hidden, heads = config["hidden"], 4
    gpt = config["model"] == "gpt2"
    if gpt:
        attention = AttentionSpec(heads, heads, hidden // heads, bias=True)
        layer = LayerSpec(attention, FeedForwardSpec(4 * hidden, "gelu_new", gated=False, bias=True))
    else:
        layer = LayerSpec(AttentionSpec(heads, 2, hidden // heads), FeedForwardSpec(3 * hidden))
    tied = config.get("tied", gpt)
    layers = (layer,) * config["layers"]
    return ModelSpec("recorded", config["model"], hidden, config["vocab"], 64, layers, tied_embeddings=tied)


def recorded_report(config):
    training = Training(
        micro_batch=config["batch"],
        seq_len=config["seq"],
        gradient_accumulation=config.get("accum", 1),
        weights=FP32 if config.get("dtype") == "fp32" else BF16,
        attention="eager",
        clip=config.get("clip"),
        optimizer=OPTIMIZERS[config.get("optim", "adamw_foreach")],
    )
    zero3 = DeepSpeedZero3(**config["zero"], grad_accum_dtype=FP32 if config.get("gad") else None)
    strategies = [*([FullCheckpointing()] if config.get("ac") else []), zero3]
    mesh = Mesh(dp_shard=config["world"])
    return simulate(recorded_model(config), training, strategies, mesh=mesh, rank=config.get("rank", 0))


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["name"])
def test_real_runs_are_met_to_the_byte(line):
    """Peaks of a steady step and of the first, their phases, and what stays between steps."""
    report = recorded_report(line["config"])
    assert report.steady.nbytes == line["peak_bytes"]
    assert report.steady.start_bytes == line["start_bytes"]
    assert report.steady.phase.value == line["phase"]
    assert report.cold.phase.value == line["first_phase"]
    assert report.cold.nbytes == line["first_step_peak_bytes"]


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize(("accumulates", "gradients"), [(None, 2), (FP32, 4)])
def test_the_papers_arithmetic(ranks, accumulates, gradients):
    """Rajbhandari et al., section 5.3: (2 + 2 + K) Psi / N with K = 12; DeepSpeed keeps the gradients between steps."""
    training = Training(weights=BF16, seq_len=4, optimizer=FUSED)
    zero3 = DeepSpeedZero3(reduce_bucket_size=1, grad_accum_dtype=accumulates, **FRUGAL)
    report = simulate("llama-3.2-3b", training, [zero3], mesh=Mesh(dp_shard=ranks))
    expected = (2 + gradients + 12) * report.parameters / ranks
    assert report.steady.start_bytes == pytest.approx(expected, rel=1e-4)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(model_specs(max_layers=4), st.integers(1, 9), st.sampled_from([1, 500, 10**9]))
def test_all_ranks_hold_the_model_once_and_padding(model, ranks, sub_group):
    """Every weight is padded by less than one element a rank, in each of its copies."""
    training = Training(seq_len=4, weights=FP16, attention="eager", optimizer=FUSED)
    zero3 = DeepSpeedZero3(reduce_bucket_size=1, sub_group_size=sub_group, **FRUGAL)
    report = simulate(model, training, [zero3], mesh=Mesh(dp_shard=ranks))
    found, tensors = kept(report), report.plan.dimensions.bindings["tensors"]
    for role, width in ((Role.PARAMETER, 2), (Role.GRADIENT, 2), (Role.MASTER_WEIGHT, 4)):
        assert 0 <= ranks * found[role] - width * report.parameters < width * ranks * tensors


def test_what_options_are_for():
    """Each saves memory on a model that is larger than they allow."""
    training = Training(micro_batch=8, seq_len=32, weights=BF16, optimizer=FUSED)

    def peak(**options):
        chosen = {"reduce_bucket_size": 10_000, **options}
        return simulate(uniform_llama(8), training, [DeepSpeedZero3(**chosen)], mesh=Mesh(dp_shard=4)).steady.nbytes

    assert peak(**FRUGAL) < peak()
    assert peak(**{**FRUGAL, "reduce_bucket_size": 1_000_000}) > peak(**FRUGAL)
    assert peak(stage3_allgather_sequential=True) <= peak()


@pytest.mark.parametrize(("elements", "groups"), [(8, 1), (8000, 1), (16384, 4), (80, 1), (12_000, 2)])
def test_groups_of_the_quantizer(elements, groups):
    assert quantizer_groups(elements) == groups


def test_partitions_that_cannot_be_quantized_are_refused():
    with pytest.raises(UnsupportedError, match="multiples"):
        quantizer_groups(4099)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"zero_quantized_gradients": True}, "zero_quantized_gradients"),
        ({"zero_hpz_partition_size": 3}, "zero_hpz_partition_size"),
        ({"grad_accum_dtype": FP16}, "grad_accum_dtype"),
    ],
)
def test_what_is_not_modelled_is_refused(options, said):
    training = Training(weights=BF16, seq_len=4)
    with pytest.raises(UnsupportedError, match=said):
        simulate(uniform_llama(2), training, [DeepSpeedZero3(**options)], mesh=Mesh(dp_shard=4))
