"""GPT-Neo, CodeGen, BioGPT and MPT against real PyTorch code, to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors. For cases with checkpointing of GPT-Neo,
``torch.tensor(..., device=...)`` was made a tensor on the host and a copy of it, which is what the fakes do in forward.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.reading import spec_from_class
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact

CASES = Path(__file__).parents[1] / "data" / "oracle" / "early_more.jsonl"
CODEGEN = {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 8}
GPT_NEO = {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2}


def test_peaks_and_phases():
    assert_exact(validate_oracle(CASES).rows, phases_from=10**6)


@pytest.mark.parametrize("line", list(read_cases(CASES)), ids=lambda line: line["id"])
def test_parameters(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


@pytest.mark.parametrize(
    ("config_class", "config", "change", "said"),
    [
        ("GPTNeoConfig", GPT_NEO, {"num_layers": 3}, r"attention_types must be .* name 3 layers \(num_layers\)"),
        ("GPTNeoConfig", GPT_NEO, {"attention_types": [["global", 2]]}, "attention_types must be"),
        ("GPTNeoConfig", GPT_NEO, {"attention_types": [[["distant"], 2]]}, "attention_types must be"),
        ("CodeGenConfig", CODEGEN, {"n_head": 2}, "n_head must be a multiple of 4, not 2"),
        ("CodeGenConfig", CODEGEN, {"rotary_dim": 7}, "rotary_dim must be even and at most n_embd / n_head = 8, not 7"),
        ("CodeGenConfig", CODEGEN, {"rotary_dim": 10}, "rotary_dim must be even"),
        ("CodeGenConfig", CODEGEN, {"rotary_dim": None}, "rotary_dim must be"),
    ],
)
def test_wrong_configs_are_named(config_class, config, change, said):
    with pytest.raises(UsageError, match=said):
        spec_from_class(config_class, config | change, "mine")


@pytest.mark.parametrize(
    "change",
    [
        {"no_bias": False},
        {"expansion_ratio": 3},
        {"attn_config": {"alibi": False}},
        {"attn_config": {"attn_type": "multiquery_attention"}},
        {"attn_config": {"attn_pdrop": 1}},
    ],
    ids=str,
)
def test_what_the_model_of_mpt_ignores_is_refused(change):
    with pytest.raises(UnsupportedError, match="is not modelled: set it to"):
        spec_from_class("MptConfig", MPT | change, "mine")


@pytest.mark.parametrize(
    ("config_class", "config"), [("GPTNeoConfig", GPT_NEO), ("CodeGenConfig", CODEGEN), ("MptConfig", MPT)]
)
def test_families_without_sdpa_say_so(config_class, config):
    with pytest.raises(UnsupportedError, match="'attention' must be eager"):
        simulate(spec_from_class(config_class, config, "mine"), Training(attention="sdpa"))
