"""Megatron-LM with Transformer Engine, tensor parallel and with the distributed optimizer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.reading import spec_from_class
from simulator.roles import Role
from simulator.workload import Optimizer
from strategies.megatron import MegatronDistributedOptimizer
from strategies.tensor_parallel import TensorParallel

LLAMA = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 208}
LLAMA |= {"num_hidden_layers": 3, "vocab_size": 1024, "max_position_embeddings": 256}
GPT = {"n_embd": 128, "n_head": 8, "n_layer": 3, "vocab_size": 1024, "n_positions": 256, "tie_word_embeddings": False}
MODELS = {"llama": spec_from_class("LlamaConfig", LLAMA, "tiny"), "gpt2": spec_from_class("GPT2Config", GPT, "tiny")}
#: Long enough that the peak is where the loss is, with all activations of forward alive.
LENGTH = 256


def training(**options):
    fused = Optimizer(name="adamw", implementation="fused")
    defaults = {"implementation": "megatron_te", "micro_batch": 2, "seq_len": LENGTH, "weights": BF16}
    return Training(**{**defaults, "optimizer": fused, **options})


def simulated(family="llama", tp=2, shards=2, sequence=True, fusion=True, **options):
    parallel = [TensorParallel(sequence_parallel=sequence)] if tp > 1 else []
    owner = MegatronDistributedOptimizer(gradient_accumulation_fusion=fusion)
    mesh = Mesh(dp_shard=shards, tp=tp)
    return simulate(MODELS[family], training(**options), [*parallel, owner], mesh=mesh)


@settings(max_examples=30)
@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(["megatron", "megatron_te"]),
    st.sampled_from(["default", "te_fused"]),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
def test_the_fold_meets_the_timeline_and_nothing_is_left(family, whose, loss, tp, sequence, fusion, accumulation):
    options = {"implementation": whose, "loss": loss, "gradient_accumulation": accumulation, "seq_len": 32}
    report = simulated(family, tp, 2, sequence, fusion, **options)
    assert report.steady.start_bytes == report.steady.end_bytes
    assert report.peak.nbytes == report.timeline(None).total.max()
    assert report.peak.nbytes == sum(live.nbytes for live in report.live())


def test_buffers_hold_what_tensor_parallelism_leaves_to_the_rank():
    """Weights but for the norms are halved, and gradients and states follow."""
    whole, half = (simulated(tp=tp, shards=1).peak.by_role for tp in (1, 2))
    for role in (Role.PARAMETER, Role.BUCKET, Role.MASTER_WEIGHT, Role.OPTIMIZER_STATE):
        assert half[role] == pytest.approx(whole[role] / 2, rel=0.02)


def saved(report, label):
    return [live.nbytes for live in report.live() if live.identity[1] == 1 and label in live.identity[0]]


@pytest.mark.parametrize("family", sorted(MODELS))
def test_attention_keeps_contiguous_queries_keys_and_values_but_not_the_projection(family):
    """Megatron's own modules keep the fused projection for the sake of the values in it."""
    assert saved(simulated(family, implementation="megatron"), "linear_qkv.mm") or family == "gpt2"
    report = simulated(family)
    assert saved(report, "linear_qkv.mm") == saved(report, "linear_qkv.add") == []


def test_no_cosines_and_sines_are_kept():
    assert saved(simulated(implementation="megatron"), "_to_copy")
    assert saved(simulated(), "_to_copy") == []


def test_the_fused_loss_has_no_fp32_logits():
    logits = 2 * LENGTH * 1024 // 2
    fused, own = (simulated(loss=loss) for loss in ("te_fused", "default"))
    wide = [live.nbytes for live in own.live() if live.storage.role is Role.LOSS_HEAD and live.storage.dtype == FP32]
    assert 4 * logits in wide
    assert fused.peak.nbytes < own.peak.nbytes
    kept = [live.nbytes for live in fused.live() if live.storage.role is Role.LOSS_HEAD]
    assert max(kept) == 2 * logits


def test_the_loss_of_transformer_engine_is_megatrons_alone():
    with pytest.raises(UsageError, match="'loss' te_fused"):
        training(implementation="transformers", loss="te_fused")


def test_buffers_over_dtensors_are_refused():
    with pytest.raises(UnsupportedError, match="'tp'"):
        simulated(implementation="transformers", sequence=False)
