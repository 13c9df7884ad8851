"""Options that would change nothing, or that no code takes, are refused in one line instead of being passed over."""

from __future__ import annotations

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator.reading import read_model, spec_from_config
from studies.estimate import estimate
from studies.options import TrainingOptions, resolve


def refused(model, **options):
    with pytest.raises(UsageError) as error:
        estimate(read_model(model), "h100-80", TrainingOptions(**options))
    return error


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_falcon_has_attention_of_two_kinds(attention):
    error = refused("falcon-7b", dtype="bf16", attention=attention)
    assert error.type is UnsupportedError
    assert attention in str(error.value)


@pytest.mark.parametrize("options", [{"experts": "batched_mm"}, {"experts": "eager", "expert_imbalance": 2.0}])
def test_a_dense_model_has_no_experts_to_run(options):
    assert "no experts" in str(refused("gpt2", **options).value)


@pytest.mark.parametrize("options", [{"freeze": "layers=0"}, {"strategy": ("freeze",)}])
def test_freezing_nothing_is_no_freezing(options):
    assert "freezes nothing" in str(refused("gpt2", **options).value)


def test_layers_whose_first_one_casts_nothing():
    """Norms after each half give fp32 under autocast: FSDP2 casts it on the way into every layer but the first."""
    sizes = {"hidden_size": 96, "ffn_dim": 40, "word_embed_proj_dim": 24, "num_attention_heads": 4, "vocab_size": 50}
    config = {"model_type": "opt", "num_hidden_layers": 5, "do_layer_norm_before": False, **sizes}
    options = TrainingOptions(dtype="amp-bf16", strategy=("fsdp2,param_dtype=bf16",), seq_len=64, micro_batch=8)
    result = estimate(spec_from_config(config, "opt"), "8xh100-80", options)
    assert sum(live.nbytes for live in result.live) == result.peak.nbytes


def test_no_expert_gets_more_tokens_than_there_are():
    assert "at most 16" in str(refused("qwen3-30b-a3b", experts="eager", expert_imbalance=16.5).value)


MAMBA = {"hidden_size": 12, "num_heads": 4, "head_dim": 6, "n_groups": 1, "state_size": 5, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention": "eager"}, "'attention' changes nothing: this mamba2 has no attention"),
        ({"sdpa_backend": "flash"}, "'sdpa-backend' changes nothing: this mamba2 has no attention"),
    ],
)
def test_options_about_attention_need_some(options, why):
    model = spec_from_config({"model_type": "mamba2", "vocab_size": 7, **MAMBA}, "m")
    with pytest.raises(UsageError, match=why):
        resolve(TrainingOptions(**options), model)
    result = estimate(model, "1x24GiB", TrainingOptions(seq_len=8))
    assert "attention" not in result.workload
    assert not any("attention" in line or "sdpa" in line for line in result.assumptions)


def test_a_kernel_of_sdpa_is_for_sdpa_alone():
    model = read_model("smollm2-135m")
    with pytest.raises(UsageError, match="'sdpa-backend' changes nothing: attention is eager"):
        resolve(TrainingOptions(attention="eager", sdpa_backend="flash"), model)
