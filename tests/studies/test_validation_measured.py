"""Runs measured on GPUs: what a row of theirs means, and that none of its fields is ignored in silence."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator import simulate
from studies.cli.main import run
from studies.validation import validate_measured
from studies.validation.measured_run import measured_run

SHARED = Path(__file__).parents[3] / "shared" / "measured" / "gpu_peaks.jsonl"
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 3, "intermediate_size": 160, "vocab_size": 500,
    "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
ROW = {
    "name": "tiny", "source": "ours", "model": None, "config": {**CONFIG, "padded_vocab_size": 512},
    "framework": "hf", "framework_version": "transformers 5.23", "torch_version": "2.6.0+cu124", "task": "full",
    "gpu": "A100-SXM4-80GB", "num_gpus": 1, "mesh": {"pp": 1, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1},
    "strategy": "none", "strategy_options": {}, "sequence_parallel": False, "pp_schedule": None,
    "param_dtype": "bf16", "compute_dtype": "bf16", "grad_dtype": "bf16", "reduce_dtype": None,
    "optimizer_state_dtype": "bf16", "master_weights": None, "optimizer": "AdamW", "optimizer_impl": "foreach",
    "micro_batch": 2, "num_microbatches": 1, "seq_len": 48, "attention": "flash_attention_2",
    "kernels": {"norm": "hf_rmsnorm fp32 upcast", "rope": "hf eager", "swiglu": "eager", "linear": "torch",
                "compile": False},
    "checkpointing": {"mode": "full", "detail": None}, "loss": "hf_fp32", "lora": None, "quantisation": None,
    "offload": None, "moe": None, "inference": None, "metric": "allocated", "phase": "whole run", "rank": 0,
    "expected_bytes": 10**6, "other_expected": {}, "tolerance_pct": 0.5, "bar": "hard", "assumed": [], "notes": "",
}  # fmt: skip


def written(tmp_path, *rows):
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_run_is_simulated_as_it_was_configured():
    asked = measured_run(ROW)
    assert asked.model.vocab == 512
    assert asked.training.torch == (2, 6)
    assert asked.training.clip == 1.0
    assert (asked.training.micro_batch, asked.training.seq_len) == (2, 48)
    assert [strategy.name for strategy in asked.strategies] == ["full_checkpointing"]
    assert not asked.steady_only
    assert measured_run({**ROW, "phase": "steady step"}).steady_only


MEGATRON = {
    **ROW, "name": "tp", "framework": "megatron", "task": "pretrain", "num_gpus": 4, "mesh": {"dp_shard": 2, "tp": 2},
    "strategy": "megatron_distopt", "strategy_options": {"zero_stage": 1, "gradient_accumulation_fusion": True},
    "sequence_parallel": True, "grad_dtype": "fp32", "reduce_dtype": "fp32", "optimizer_state_dtype": "fp32",
    "master_weights": "fp32", "optimizer": "Adam", "optimizer_impl": "fused", "attention": "te_fused",
    "kernels": {"rope": "te_fused", "cross_entropy": "te_fused", "bias_dropout_add": "unfused"}, "loss": "fused_ce",
    "checkpointing": {"mode": "none"}, "rank": "max over ranks (rank 3)",
}  # fmt: skip
GPT = {
    "model_type": "megatron_gpt", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "gated_mlp": False, "hidden_act": "gelu",
    "attention_bias": True, "mlp_bias": True, "norm_type": "LayerNorm", "position_embedding": "learned_absolute",
    "max_position_embeddings": 64, "vocab_size": 500, "padded_vocab_size": 512, "tie_word_embeddings": False,
    "hidden_dropout": 0.1, "attention_dropout": 0.1,
}  # fmt: skip
TORCHTUNE = {
    **ROW, "framework": "torchtune", "attention": "flex_attention (compiled, BlockMask)",
    "kernels": {"cross_entropy": "F.cross_entropy on .float() logits", "compile": False},
}  # fmt: skip


def test_megatron_runs_on_its_mesh_with_its_precisions(tmp_path):
    asked = measured_run(MEGATRON)
    assert (asked.mesh.tp, asked.mesh.dp_shard, asked.rank) == (2, 2, 1)
    assert [strategy.name for strategy in asked.strategies] == ["tensor_parallel", "megatron_distributed_optimizer"]
    assert (asked.training.implementation, asked.training.loss) == ("megatron_te", "te_fused")
    assert "unfused" not in " ".join(asked.notes)
    rows = validate_measured(written(tmp_path, MEGATRON, {**MEGATRON, "config": GPT})).rows
    assert [row.reason for row in rows] == [None, None]


def test_megatron_shards_sequences(tmp_path):
    """Ranks along ``cp`` lie between those of ``tp`` and of data parallelism, and share the optimizer."""
    row = {**MEGATRON, "num_gpus": 8, "mesh": {"dp_shard": 2, "cp": 2, "tp": 2}, "rank": "rank 5"}
    options = {**MEGATRON["strategy_options"], "cp_comm_type": "a2a"}
    asked = measured_run({**row, "strategy_options": options})
    assert (asked.mesh.cp, asked.mesh.dp_shard_cp, asked.rank) == (2, 4, 2)
    names = ["tensor_parallel", "context_parallel", "megatron_distributed_optimizer"]
    assert [strategy.name for strategy in asked.strategies] == names
    assert asked.strategies[1].communication == "a2a"
    assert [row.reason for row in validate_measured(written(tmp_path, row)).rows] == [None]
    with pytest.raises(UnsupportedError, match="cp_comm_type"):
        measured_run({**row, "strategy_options": {**options, "cp_comm_type": "a2a+p2p"}})


@pytest.mark.parametrize("change", [{"norm_type": "RMSNorm"}, {"gated_mlp": True}, {"qk_layernorm": True}])
def test_another_gpt_of_megatron_is_refused(change):
    with pytest.raises(UnsupportedError, match=f"config.{next(iter(change))}"):
        measured_run({**MEGATRON, "config": {**GPT, **change}})


def test_a_gpt_of_megatron_needs_its_sizes():
    with pytest.raises(UsageError, match=r"config\.head_dim"):
        measured_run({**MEGATRON, "config": {key: value for key, value in GPT.items() if key != "head_dim"}})


def test_torchtune_packs_its_data():
    assert measured_run(TORCHTUNE).training.attention == "flex_attention"


def test_what_a_compiled_layer_saves_is_not_guessed():
    kernels = {**TORCHTUNE["kernels"], "compile": True}
    assert any("compil" in note for note in measured_run({**TORCHTUNE, "kernels": kernels}).notes)
    with pytest.raises(
        UnsupportedError, match=r"kernels\.compile true is not simulated yet without checkpointing\.mode"
    ):
        measured_run({**TORCHTUNE, "kernels": kernels, "checkpointing": {"mode": "none"}})


STAGED = {
    **MEGATRON, "num_gpus": 8, "mesh": {"pp": 2, "dp_shard": 2, "tp": 2, "virtual_pp": 1}, "pp_schedule": "1F1B",
    "config": {**CONFIG, "num_hidden_layers": 4}, "num_microbatches": 4,
}  # fmt: skip


def test_a_rank_of_a_pipeline_is_found_by_its_number():
    for rank, stage, replica in ((0, 0, 0), (3, 0, 1), (5, 1, 0), (7, 1, 1)):
        asked = measured_run({**STAGED, "rank": rank})
        assert (asked.strategies[0].rank, asked.rank) == (stage, replica)
    interleaved = {**STAGED, "mesh": {**STAGED["mesh"], "virtual_pp": 2}}
    with pytest.raises(UsageError, match="1F1B just where"):
        measured_run(interleaved)


def test_other_targets_of_a_run_are_rows_of_their_own(tmp_path):
    targets = {"allocated_first_stage_max": 10**6, "allocated_last_stage_max": 10**6, "allocated_between_steps": 10**6}
    peak, between, first, last = validate_measured(written(tmp_path, {**STAGED, "other_expected": targets})).rows
    assert first.name == "tp:allocated_first_stage_max"
    assert (peak.bar, last.bar) == ("hard", "hard")
    assert between.simulated_bytes < peak.simulated_bytes
    assert first.simulated_bytes != last.simulated_bytes


def test_metric_tolerance_and_bar_are_carried_through(tmp_path):
    peak = simulate(*_arguments(measured_run(ROW))).peak.nbytes
    path = written(tmp_path, {**ROW, "expected_bytes": 2 * peak}, {**ROW, "metric": "reserved", "bar": "soft"})
    compared, refused = validate_measured(path).to_json_dict()["rows"]
    assert compared["error_pct"] == -50
    assert (compared["metric"], compared["tolerance_pct"], compared["bar"]) == ("allocated", 0.5, "hard")
    assert (refused["metric"], refused["bar"], refused["simulated_bytes"]) == ("reserved", "soft", None)
    assert "allocator" in refused["reason"]
    assert validate_measured(path).summary.n == 1


def _arguments(asked):
    return asked.model, asked.training, asked.strategies


def test_active_is_taken_as_allocated_and_says_so(tmp_path):
    rows = validate_measured(written(tmp_path, ROW, {**ROW, "metric": "active"})).rows
    assert rows[0].simulated_bytes == rows[1].simulated_bytes
    assert any(note.startswith("active") for note in rows[1].notes)


def test_a_preset_stands_in_for_a_config(tmp_path):
    row = {**ROW, "model": "gpt2", "config": None, "attention": "sdpa", "kernels": {}}
    assert validate_measured(written(tmp_path, row)).summary.n == 1


OTHERWISE = {
    "lora": {"lora": {"r": 8}},
    "quantisation": {"quantisation": {"mode": "nf4"}},
    "offload": {"offload": {"params": "cpu"}},
    "moe": {"moe": {"dispatch": "alltoall"}},
    "inference": {"inference": {"prompt_len": 8}},
    "task": {"task": "serving"},
    "metric": {"metric": "nvidia_smi"},
    "framework": {"framework": "vllm"},
    "mesh.pp": {"mesh": {"pp": 2}},
    "mesh.ep": {"mesh": {"ep": 8}},
    "strategy": {"strategy": "fsdp1"},
    "strategy_options.wrap": {"strategy_options": {"wrap": "layer"}},
    "sequence_parallel": {"sequence_parallel": True},
    "pp_schedule": {"pp_schedule": "1F1B"},
    "param_dtype": {"param_dtype": "fp8"},
    "compute_dtype": {"compute_dtype": "fp16 autocast (GradScaler)"},
    "grad_dtype": {"grad_dtype": "fp32"},
    "optimizer_state_dtype": {"optimizer_state_dtype": "fp32"},
    "master_weights": {"master_weights": "fp32"},
    "reduce_dtype": {"reduce_dtype": "fp32"},
    "optimizer": {"optimizer": "Lion"},
    "optimizer_impl": {"optimizer_impl": "paged"},
    "attention": {"attention": "flash_attention_3"},
    "kernels.cross_entropy": {"kernels": {"cross_entropy": "liger"}},
    "kernels.compile": {"kernels": {"compile": True}},
    "kernels.dropout": {"kernels": {"dropout": "fused"}},
    "checkpointing.mode": {"checkpointing": {"mode": "selective"}},
    "checkpointing.detail": {"checkpointing": {"mode": "full", "detail": "every second layer"}},
    "loss": {"loss": "liger"},
    "phase": {"phase": "after training"},
    "packing": {"packing": True},
}


@pytest.mark.parametrize("field", sorted(OTHERWISE))
def test_what_is_not_simulated_is_refused_by_its_name(field):
    with pytest.raises(UnsupportedError, match=re.escape(field)):
        measured_run({**ROW, **OTHERWISE[field]})


WRONG = {
    "num_gpus": {"num_gpus": 2},
    "dp_shard": {"mesh": {"dp_shard": 0}},
    "mesh": {"mesh": [1]},
    "kernels": {"kernels": "all"},
    "rank": {"rank": 3},
    "micro_batch": {"micro_batch": None},
    "seq_len": {"seq_len": "long"},
    "vocab": {"config": {**CONFIG, "padded_vocab_size": -1}},
}


@pytest.mark.parametrize("field", sorted(WRONG))
def test_a_value_that_is_wrong_is_a_row_with_its_reason(tmp_path, field):
    with pytest.raises(UsageError, match=field):
        measured_run({**ROW, **WRONG[field]})
    (row,) = validate_measured(written(tmp_path, {**ROW, **WRONG[field]})).rows
    assert field in row.reason
    assert "\n" not in row.reason


BROKEN = {
    "object with a 'name'": [1],
    "'model'": {**ROW, "config": None},
    "'metric'": {**ROW, "metric": "VRAM"},
    "'expected_bytes'": {**ROW, "expected_bytes": 1.5e9},
    "'bar'": {**ROW, "bar": "high"},
    "'tolerance_pct'": {**ROW, "tolerance_pct": None},
}


@pytest.mark.parametrize("lacks", sorted(BROKEN))
def test_a_broken_line_is_named(tmp_path, capsys, lacks):
    path = written(tmp_path, ROW, BROKEN[lacks])
    assert run(["validate", "measured", "--cases", str(path)]) == 2
    error = capsys.readouterr().err
    assert "line 2" in error
    assert lacks in error
    assert error.count("\n") == 1


def test_a_field_that_is_not_there_is_a_reason(tmp_path):
    (row,) = validate_measured(written(tmp_path, {key: value for key, value in ROW.items() if key != "lora"})).rows
    assert "'lora'" in row.reason


def test_a_file_without_runs_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("\n")
    with pytest.raises(UsageError, match="at least one run"):
        validate_measured(path)


def test_our_own_error_is_a_row(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("studies.validation.measured.simulate", broken)
    (row,) = validate_measured(written(tmp_path, ROW)).rows
    assert row.reason == "our error: RuntimeError: two lines"


def test_bounds_and_text(tmp_path, capsys):
    path = str(written(tmp_path, ROW))
    assert run(["validate", "measured", "--cases", path, "--max-worst", "0"]) == 3
    captured = capsys.readouterr()
    assert "allocated, hard 0.5 %" in captured.out
    assert "max-worst" in captured.err
    assert run(["validate", "measured", "--cases", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["summary"]["n"] == 1


@pytest.mark.skipif(not SHARED.exists(), reason="published measurements are not part of the repository")
def test_published_measurements_are_met_where_they_are_simulated():
    """An error above the tolerance of a hard row would be ours; no row is dropped."""
    rows = validate_measured(SHARED).rows
    peaks = [row for row in rows if ":" not in row.name]
    assert len(peaks) == len(SHARED.read_text().splitlines())
    assert [row.name for row in rows if row.reason and row.reason.startswith("our error")] == []
    hard = [row for row in rows if row.bar == "hard" and row.error_pct is not None]
    assert [row.name for row in hard if abs(row.error_pct) > row.tolerance_pct] == []
