"""Runs of Megatron-LM measured with experts: what a row says of routing, and the published peaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardware.errors import UnsupportedError, UsageError
from studies.validation import validate_measured
from studies.validation.measured_run import measured_run

SHARED = Path(__file__).parents[3] / "shared" / "measured" / "gpu_peaks.jsonl"
DEEPSEEK = ("simumax-b200-deepseekv2_tp1", "simumax-b200-deepseekv3_l4_tp1")
CAPACITY = {"factor": 1.0, "pad_to_capacity": True, "drop": True}
ROW = {
    "name": "experts", "source": "ours", "model": None, "framework": "megatron", "framework_version": "0.14",
    "config": {
        "model_type": "deepseek_v3", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 96, "moe_intermediate_size": 40, "n_shared_experts": 1, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 48, "kv_lora_rank": 24, "n_group": 1,
        "topk_group": 1, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "vocab_size": 250,
        "num_hidden_layers": 3, "max_position_embeddings": 128, "e_score_correction_bias": False,
        "padded_vocab_size": 256,
    },
    "torch_version": "2.10", "task": "pretrain", "gpu": "B200-SXM-180GB", "num_gpus": 4,
    "mesh": {"pp": 1, "dp_replicate": 1, "dp_shard": 4, "cp": 1, "tp": 1, "ep": 2, "etp": 1},
    "strategy": "megatron_distopt", "strategy_options": {"expert_dp": 2}, "sequence_parallel": False,
    "pp_schedule": None, "param_dtype": "bf16", "compute_dtype": "bf16", "grad_dtype": "fp32", "reduce_dtype": "fp32",
    "optimizer_state_dtype": "fp32", "master_weights": "fp32", "optimizer": "Adam", "optimizer_impl": "fused",
    "micro_batch": 1, "num_microbatches": 2, "seq_len": 64, "attention": "te_fused", "kernels": {}, "lora": None,
    "checkpointing": {"mode": "none"}, "loss": "fused_ce", "quantisation": None, "offload": None, "inference": None,
    "moe": {"dispatch": "alltoall", "capacity": CAPACITY, "imbalance": 1.0}, "metric": "allocated",
    "phase": "whole run", "rank": 0, "expected_bytes": 10**6, "other_expected": {}, "tolerance_pct": 0.5,
    "bar": "hard", "assumed": [], "notes": "",
}  # fmt: skip


def test_a_row_says_how_tokens_reach_their_experts():
    run = measured_run(ROW)
    assert (run.mesh.ep, run.mesh.expert_shards, run.training.capacity_factor) == (2, 2, 1.0)
    assert run.model.family == "deepseek_v2"  # its router: scores are a softmax, and nothing corrects them
    dropless = measured_run({**ROW, "moe": {"dispatch": "alltoall", "imbalance": 1.5}})
    assert (dropless.training.capacity_factor, dropless.training.expert_imbalance) == (None, 1.5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"moe": {"dispatch": "deepep"}}, UnsupportedError, "moe.dispatch"),
        ({"moe": {"capacity": {**CAPACITY, "drop": False}}}, UnsupportedError, "moe.capacity.drop"),
        ({"moe": {"capacity": {**CAPACITY, "pad_to_capacity": False}}}, UnsupportedError, "moe.capacity.pad"),
        ({"moe": {"overlap": True}}, UnsupportedError, "moe.overlap"),
        ({"moe": []}, UsageError, "'moe' must be an object"),
        ({"mesh": {**ROW["mesh"], "etp": 2}}, UnsupportedError, "mesh.etp"),
    ],
)
def test_what_is_not_simulated_is_refused_by_its_name(changes, error, message):
    with pytest.raises(error, match=message):
        measured_run({**ROW, **changes})


@pytest.mark.skipif(not SHARED.exists(), reason="published measurements are not here")
def test_published_peaks_with_experts_are_met(tmp_path):
    """SimuMax's DeepSeek-V2 and V3 of four layers on eight B200, within what their source allows."""
    rows = [json.loads(line) for line in SHARED.read_text().splitlines()]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows if row["name"].startswith(DEEPSEEK)))
    found = validate_measured(path).rows
    assert len(found) == 2
    for row in found:
        assert row.reason is None or not row.reason
        assert abs(row.error_pct) < 1.5
