"""Mixtures of experts against real PyTorch code: small recorded cases of every family, to the byte.

Cases of fp32 weights were recorded with one check of torch lifted: the fake kernel of ``_grouped_mm`` takes bf16
only (torch/_meta_registrations.py `_meta_grouped_mm_common`), CUDA's takes fp32, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.reading import spec_from_class
from studies.validation import oracle_case, read_cases, validate_oracle

OWN = Path(__file__).parents[1] / "data" / "oracle" / "experts.jsonl"
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_peaks_and_phases():
    rows = validate_oracle(OWN).rows
    assert [row.name for row in rows if row.error_pct != 0] == []
    assert [row.name for row in rows if row.phase_expected != row.phase_simulated] == []


@pytest.mark.parametrize("line", list(read_cases(OWN)), ids=lambda line: line["id"])
def test_parameters(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


def test_experts_are_counted_not_built():
    """The number of experts changes bytes, not the size of the graph that is built."""
    few, many = (spec_from_class("MixtralConfig", {**SMALL, "num_local_experts": n}, "m") for n in (2, 512))
    built = [len(simulate(model, Training(seq_len=8)).plan.graph.ops) for model in (few, many)]
    assert built[0] == built[1]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_other_implementations_are_refused_by_name(implementation):
    model = spec_from_class("MixtralConfig", SMALL, "m")
    with pytest.raises(UnsupportedError, match=f"'experts' must be grouped_mm: '{implementation}'"):
        simulate(model, Training(seq_len=8, experts=implementation))


def test_rows_that_the_kernel_refuses():
    model = spec_from_class("MixtralConfig", {**SMALL, "intermediate_size": 30}, "m")
    with pytest.raises(UnsupportedError, match="multiple of 4 with weights of"):
        simulate(model, Training(seq_len=8))


@pytest.mark.parametrize(("key", "value"), [("output_router_logits", True), ("router_jitter_noise", 0.1)])
def test_router_options_are_refused(key, value):
    with pytest.raises(UnsupportedError, match=f"{key}=.* is not modelled"):
        spec_from_class("MixtralConfig", {key: value}, "m")


def test_more_experts_per_token_than_experts():
    with pytest.raises(UsageError, match="num_experts_per_tok must be at most num_local_experts"):
        spec_from_class("MixtralConfig", {"num_experts_per_tok": 9}, "m")
