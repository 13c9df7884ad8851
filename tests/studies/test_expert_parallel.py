"""``--ep`` and ``--capacity-factor`` from the command line: Megatron-LM's experts, their band, what is refused."""

from __future__ import annotations

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator.reading import spec_from_config
from studies.estimate import estimate
from studies.options import TrainingOptions, resolve

MODEL = spec_from_config(
    {
        "model_type": "deepseek_v2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 96, "moe_intermediate_size": 160, "n_shared_experts": 1, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 48, "kv_lora_rank": 24,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "vocab_size": 256, "num_hidden_layers": 3,
        "max_position_embeddings": 256,
    },
    "tiny",
)  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
DENSE = spec_from_config({**LLAMA, "num_attention_heads": 4}, "dense")
GIVEN = {"dtype": "bf16", "implementation": "megatron_te", "strategy": ("megatron_distributed_optimizer",)}


def options(**given):
    return TrainingOptions(**{**GIVEN, **given})


def test_tokens_that_are_not_dropped_make_a_band():
    """From every rank getting as many to one getting all that its experts can get."""
    found = estimate(MODEL, "8xh100-80", options(ep=4))
    assert found.routing is not None
    assert found.routing.even == found.peak.nbytes
    assert found.routing.worst > found.routing.even
    assert (found.routing.imbalance, found.routing.busiest) == (4.0, "this rank")
    between = estimate(MODEL, "8xh100-80", options(ep=4, expert_imbalance=2.0))
    assert found.routing.even < between.peak.nbytes < found.routing.worst
    assert "8 (experts over 4)" in found.workload


@pytest.mark.parametrize("given", [{"ep": 4, "capacity_factor": 1.25}, {}])
def test_a_capacity_or_one_rank_with_all_experts_leaves_no_band(given):
    assert estimate(MODEL, "8xh100-80", options(**given)).routing is None


def test_shared_experts_count_once_for_the_whole_model():
    counts = {estimate(MODEL, "8xh100-80", options(ep=ep)).report.parameters for ep in (1, 2, 8)}
    assert len(counts) == 1


@pytest.mark.parametrize(
    ("model", "given", "error", "message"),
    [
        (MODEL, {"ep": 3}, UsageError, "'ep' must divide 'dp_shard'"),
        (MODEL, {"ep": 4, "experts": "eager"}, UsageError, "'experts' changes nothing: megatron_te runs experts"),
        (MODEL, {"ep": 4, "implementation": "transformers"}, UnsupportedError, "implementation megatron_te"),
        (MODEL, {"capacity_factor": 1.0, "implementation": None}, UsageError, "goes with implementation megatron_te"),
        (DENSE, {"ep": 4}, UsageError, "'ep' changes nothing: this llama has no experts"),
        (DENSE, {"capacity_factor": 2.0}, UsageError, "'capacity-factor' changes nothing"),
    ],
)
def test_what_has_no_meaning_is_refused(model, given, error, message):
    with pytest.raises(error, match=message) as caught:
        estimate(model, "8xh100-80", options(**given))
    assert "\n" not in str(caught.value)


def test_defaults_that_decide_a_size_are_said():
    lines = resolve(options(ep=4), MODEL, 8).assumptions
    assert any(line.startswith("--expert-imbalance 1") for line in lines)
    assert not any(line.startswith("--experts ") for line in lines)
    assert not any("imbalance" in line for line in resolve(options(ep=4, capacity_factor=1.0), MODEL, 8).assumptions)
