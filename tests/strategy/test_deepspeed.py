"""DeepSpeed's ZeRO stages: the contract, real runs of DeepSpeed on small models, the paper's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Optimizer, Training, simulate
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.plan import apply, make_plan, rank_classes
from simulator.roles import Role
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.deepspeed.partition import FlatBuffer
from strategies.deepspeed.zero3 import DeepSpeedZero3
from strategies.deepspeed.zero12 import DeepSpeedZero1, DeepSpeedZero2
from tests.strategies import model_specs, uniform_llama
from tests.strategy.kept import kept

STAGES = {1: DeepSpeedZero1, 2: DeepSpeedZero2, 3: DeepSpeedZero3}
LINES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "oracle" / "deepspeed.jsonl").read_text().splitlines()
]
#: What real runs hold besides: loss scale, norm and flags, and a step count for each sub-group (on the host of a GPU).
SCALARS = 12 * 512
FUSED = Optimizer(name="adamw", implementation="fused")


class TestZero1(StrategyContract):
    strategy = DeepSpeedZero1(reduce_bucket_size=3000)
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


class TestZero1Overlapping(StrategyContract):
    strategy = DeepSpeedZero1(reduce_bucket_size=3000, overlap_comm=True)
    mesh = Mesh(dp_shard=4)


class TestBf16Optimizer(StrategyContract):
    strategy = DeepSpeedZero1(grad_accum_dtype=FP32)
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


class TestZero2(StrategyContract):
    strategy = DeepSpeedZero2(reduce_bucket_size=3000)
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


def recorded_model(config):
    heads, width = config["heads"], config["f"]
    if config["gpt2"]:
        attention = AttentionSpec(heads, heads, config["h"] // heads, bias=True)
        feed_forward = FeedForwardSpec(4 * config["h"], "gelu_new", gated=False, bias=True)
    else:
        attention = AttentionSpec(heads, config["kv"], config["h"] // heads)
        feed_forward = FeedForwardSpec(width)
    layers = (LayerSpec(attention, feed_forward),) * config["L"]
    family, tied = ("gpt2", True) if config["gpt2"] else ("llama", config["tied"])
    return ModelSpec("recorded", family, config["h"], config["V"], 64, layers, tied_embeddings=tied)


def recorded_report(config):
    training = Training(
        micro_batch=config["batch"],
        seq_len=config["seq"],
        gradient_accumulation=config["accum"],
        weights=BF16,
        attention="eager",
        optimizer=Optimizer(name="adamw", implementation="foreach" if config["foreach"] else "for-loop"),
        keep_inputs=True,
        kernel_workspace=False,
    )
    options = dict(config["zero"])
    if config["grad_accum_dtype"]:
        options["grad_accum_dtype"] = FP32
    strategies = [*([FullCheckpointing()] if config["ac"] else []), STAGES[config["stage"]](**options)]
    mesh = Mesh(dp_shard=config["world"])
    return simulate(recorded_model(config), training, strategies, mesh=mesh, rank=config["rank"])


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["name"])
def test_real_runs(line):
    """Peaks of the first and a steady step, what stays between steps, and the phase of the peak."""
    report = recorded_report(line["config"])
    assert 0 <= line["peak_bytes"] - report.steady.nbytes <= SCALARS
    assert 0 <= line["start_bytes"] - report.steady.start_bytes <= SCALARS
    assert 0 <= line["first_step_peak_bytes"] - report.cold.nbytes <= 2 * SCALARS
    assert report.steady.phase.value == line["phase"]


BARE = {"weights": BF16, "seq_len": 4, "optimizer": FUSED}


@pytest.mark.parametrize(("stage", "weights", "states"), [(1, 1, 12), (2, 1, 12), (3, 0, 12)])
@pytest.mark.parametrize("ranks", [8, 64])
def test_the_papers_arithmetic_without_buffers(stage, weights, states, ranks):
    """Rajbhandari et al., figure 1: 2 Psi of weights, whole or over N, and K Psi / N with K = 12 for Adam.

    Stage 3 of DeepSpeed keeps its 16-bit gradients between steps, too: 2 + 2 + 12 over N.
    """
    options = {"reduce_bucket_size": 1} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    report = simulate("llama-3.2-3b", Training(**BARE), [STAGES[stage](**options)], mesh=Mesh(dp_shard=ranks))
    per_parameter = {1: 2 + 12 / ranks, 2: 2 + 12 / ranks, 3: (2 + 2 + 12) / ranks}[stage]
    assert report.steady.start_bytes == pytest.approx(per_parameter * report.parameters, rel=1e-3)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(model_specs(max_layers=5), st.integers(1, 9), st.sampled_from([1, 2, 3]))
def test_partitions_of_all_ranks_are_the_model_and_padding(model, ranks, stage):
    """fp32 weights and each moment, over all ranks, are the whole model padded."""
    training = Training(seq_len=4, weights=FP16, attention="eager", optimizer=FUSED)
    mesh = Mesh(dp_shard=ranks)
    report = simulate(model, training, [STAGES[stage](reduce_bucket_size=64)], mesh=mesh)
    found = kept(report)
    tensors = report.plan.dimensions.bindings["tensors"]
    padding = 4 * ranks * (2 if stage < 3 else tensors)
    whole = 4 * report.parameters
    assert whole <= ranks * found[Role.MASTER_WEIGHT] < whole + padding
    moments = found[Role.OPTIMIZER_STATE] - 4 * tensors
    assert ranks * moments <= 2 * (whole + padding)
    shards = ranks if stage == 3 else 1
    assert found[Role.PARAMETER] * shards >= 2 * report.parameters


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(model_specs(max_layers=5), st.integers(1, 12))
def test_partitions_tile_the_flat_buffer(model, ranks):
    plan = make_plan(model, Training(seq_len=4, attention="eager"), mesh=Mesh(dp_shard=ranks))
    flat = FlatBuffer(plan)
    for member in flat.members:
        slices = flat.slices(member)
        assert sum(elements for _, elements in slices) == member.elements
        assert {rank for rank, _ in slices} == {rank for rank in range(ranks) if flat.is_own(member, rank)}
    assert sorted(member.start for member in flat.arrivals) == [member.start for member in flat.members]


def test_a_bucket_costs_what_is_configured():
    """In full however small the model, per backward; a second one with overlapping."""
    peaks = {}
    for overlap in (False, True):
        for elements in (10**6, 10**8):
            options = DeepSpeedZero2(reduce_bucket_size=elements, overlap_comm=overlap)
            report = simulate(uniform_llama(3), Training(**BARE), [options], mesh=Mesh(dp_shard=2))
            peaks[overlap, elements] = report.steady.by_role[Role.BUCKET]
    assert all(0 <= nbytes - 2 * n * (1 + overlap) < 1024 for (overlap, n), nbytes in peaks.items())


def test_small_models_are_never_released_between_forward_and_backward():
    """Under the reuse distance all weights are gathered at the end of forward; without it none is."""
    model, mesh = uniform_llama(6), Mesh(dp_shard=4)
    training = Training(micro_batch=64, seq_len=64, weights=BF16, optimizer=FUSED)
    everything = DeepSpeedZero3(reduce_bucket_size=1)
    nothing = DeepSpeedZero3(
        reduce_bucket_size=1,
        stage3_max_reuse_distance=0,
        stage3_max_live_parameters=1,
        stage3_prefetch_bucket_size=0,
        stage3_param_persistence_threshold=0,
    )
    gathered = [
        simulate(model, training, [s], mesh=mesh).steady.by_role.get(Role.GATHERED, 0) for s in (everything, nothing)
    ]
    whole = 2 * simulate(model, training).parameters
    assert whole <= gathered[0] < 1.2 * whole
    assert gathered[1] < 0.2 * whole


def test_ranks_differ_by_the_weights_their_partitions_touch():
    plan = make_plan(uniform_llama(5), Training(**BARE), mesh=Mesh(dp_shard=4))
    classes = rank_classes(apply(plan, [DeepSpeedZero2()]))
    assert sum(each.count for each in classes) == 4
    buffers = [sum(m.elements for m in FlatBuffer(plan).own(each.rank)) for each in classes]
    assert buffers == sorted(buffers, reverse=True)


@pytest.mark.parametrize(
    ("strategies", "training", "said"),
    [
        ([DeepSpeedZero2(round_robin_gradients=True)], {}, "round_robin_gradients"),
        ([DeepSpeedZero2(contiguous_gradients=False)], {}, "contiguous_gradients"),
        ([DeepSpeedZero3(zero_quantized_gradients=True)], {}, "zero_quantized_gradients"),
        ([DeepSpeedZero3(zero_hpz_partition_size=3)], {}, "zero_hpz_partition_size"),
        ([DeepSpeedZero1(grad_accum_dtype=FP16)], {}, "grad_accum_dtype"),
        ([Ddp(), DeepSpeedZero1()], {}, "both own the weights"),
        ([DeepSpeedZero1()], {"zero_grad": "zero"}, "zero-grad"),
        ([DeepSpeedZero1()], {"optimizer": Optimizer(name="adafactor")}, "adafactor"),
    ],
)
def test_what_is_not_modelled_is_refused(strategies, training, said):
    with pytest.raises(UnsupportedError, match=said):
        simulate(uniform_llama(2), Training(**{**BARE, **training}), strategies, mesh=Mesh(dp_shard=4))


def test_a_rank_outside_the_mesh_is_refused():
    with pytest.raises(UsageError, match="rank"):
        simulate(uniform_llama(2), Training(**BARE), [DeepSpeedZero2()], mesh=Mesh(dp_shard=4), rank=4)
