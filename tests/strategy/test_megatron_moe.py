"""Megatron-LM's experts over expert-parallel ranks: recorded peaks, capacity, imbalance, buffers of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.model import ExpertsSpec, FeedForwardSpec, LatentAttentionSpec, LayerSpec, ModelSpec
from simulator.roles import Role
from simulator.workload import Optimizer
from strategies.megatron import MegatronDistributedOptimizer

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "megatron_moe.jsonl"
CASES = [json.loads(line) for line in RECORDED.read_text().splitlines()]
SMALL = next(case["config"] for case in CASES if case["name"] == "megatron/moe/ep2/capacity")


def model_of(config: dict[str, Any]) -> ModelSpec:
    attention = LatentAttentionSpec(
        heads=config["heads"],
        kv_heads=config["heads"],
        head_dim=config["plain"] + config["rotary"],
        latent=config["kv_rank"],
        rotary_dim=config["rotary"],
        value_dim=config["value"],
        query_rank=config["q_rank"],
    )
    experts = ExpertsSpec(
        config["expert_width"],
        experts=config["experts"],
        per_token=config["top_k"],
        groups=config.get("groups", 1),
        chosen_groups=config.get("group_top_k", 1),
        shared_width=config.get("shared"),
    )
    dense, routed = (LayerSpec(attention, each) for each in (FeedForwardSpec(config["width"]), experts))
    layers = (dense,) * config["dense"] + (routed,) * (config["layers"] - config["dense"])
    family = {"sigmoid": "deepseek_v3", "after": "mixtral"}.get(config.get("score"), "deepseek_v2")
    return ModelSpec("tiny", family, config["hidden"], config["vocab"], config["seq"], layers, tied_embeddings=False)


def training_of(config: dict[str, Any], **options: Any) -> Training:
    copies = config["batch"] * config["seq"] * config["top_k"]
    given = {
        "micro_batch": config["batch"],
        "seq_len": config["seq"],
        "weights": {"bf16": BF16, "fp32": FP32}[config["dtype"]],
        "capacity_factor": config.get("capacity"),
        "expert_imbalance": config.get("received", copies) / copies,
        "implementation": "megatron_te",
        "optimizer": Optimizer(name="adamw", implementation="fused"),
        "kernel_workspace": False,
        "keep_inputs": True,
    }
    return Training(**{**given, **options})


OPTIONS = ("overlap_grad_reduce", "bucket_size", "use_distributed_optimizer", "grad_reduce_in_fp32")
OPTIMIZERS = {"fused": "fused", "foreach": "foreach", "loop": "for-loop"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_peaks_are_met_to_the_byte(case):
    """Megatron-core's GPTModel with latent attention and experts; kernels of Transformer Engine as one op each.

    With a world, Megatron's own data parallelism and chained optimizers are around it.
    """
    config = case["config"]
    ranks, world = config.get("ep", 1), config.get("world")
    owners = [] if world is None else [MegatronDistributedOptimizer(**{k: config[k] for k in OPTIONS if k in config})]
    optimizer = Optimizer(name="adamw", implementation=OPTIMIZERS[config.get("optim", "fused")])
    mesh, rank = Mesh(dp_shard=world or ranks, ep=ranks), config.get("rank", 0)
    report = simulate(model_of(config), training_of(config, optimizer=optimizer), owners, mesh=mesh, rank=rank)
    assert report.cold.nbytes == case["first_step_peak_bytes"]
    assert report.steady.nbytes == case["peak_bytes"]
    assert report.steady.start_bytes == case["start_bytes"]
    assert report.steady.phase.value == case["peak_phase"]


def simulated(ep=1, shards=8, capacity=None, imbalance=1.0, fusion=True, **options):
    training = training_of(SMALL, capacity_factor=capacity, expert_imbalance=imbalance, **options)
    owner = MegatronDistributedOptimizer(gradient_accumulation_fusion=fusion)
    return simulate(model_of(SMALL), training, [owner], mesh=Mesh(dp_shard=shards, ep=ep))


@settings(max_examples=20)
@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([None, 0.5, 1.0, 20.0]), st.booleans(), st.integers(1, 3))
def test_the_fold_meets_the_timeline_and_nothing_is_left(ep, capacity, fusion, accumulation):
    report = simulated(ep, 8, capacity, fusion=fusion, gradient_accumulation=accumulation)
    assert report.steady.start_bytes == report.steady.end_bytes
    assert report.peak.nbytes == report.timeline(None).total.max()
    assert report.peak.nbytes == sum(live.nbytes for live in report.live())


def test_what_is_sharded_of_experts_does_not_depend_on_how_many_ranks_share_them():
    """Fewer experts on a rank, but fewer ranks to share their optimizer's states with."""
    few, many = (simulated(ep).peak.by_role for ep in (1, 8))
    assert many[Role.OPTIMIZER_STATE] == pytest.approx(few[Role.OPTIMIZER_STATE], rel=0.1)
    assert many[Role.PARAMETER] < few[Role.PARAMETER]
    assert many[Role.BUCKET] < few[Role.BUCKET]


def test_capacity_bounds_what_experts_take_whatever_the_routing():
    even = simulated(4).peak.nbytes
    assert simulated(4, imbalance=2.0).peak.nbytes > even
    assert simulated(4, capacity=2.0).peak.nbytes > simulated(4, capacity=1.0).peak.nbytes
    assert simulated(1, imbalance=2.0).peak.nbytes == simulated(1).peak.nbytes  # a rank with all experts gets all


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mesh(dp_shard=6, ep=4), UsageError, "'ep' must divide 'dp_shard', the 6 ranks"),
        (lambda: simulated(16, 16), UsageError, "'ep' must divide the 8 experts: 16"),
        (lambda: simulated(4, implementation="megatron"), UnsupportedError, "megatron_te"),
        (lambda: Training(capacity_factor=1.0), UsageError, "goes with implementation megatron_te"),
        (lambda: simulated(4, capacity=0.0), UsageError, "'capacity_factor' must be above 0 and at most 1048576: 0.0"),
        (lambda: simulated(4, capacity=1.0, imbalance=2.0), UsageError, "leave one of the two out"),
        (lambda: simulate(model_of(SMALL), Training(), mesh=Mesh(dp_shard=2, ep=2)), UnsupportedError, "'ep' 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, error, message):
    with pytest.raises(error, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_model_without_experts_has_none_to_share():
    model = attrs.evolve(model_of(SMALL), layers=model_of(SMALL).layers[:1])
    with pytest.raises(UsageError, match="'ep' 2 is for experts, which this model has not"):
        simulate(model, training_of(SMALL), mesh=Mesh(dp_shard=2, ep=2))
