"""Families against real PyTorch code: small recorded cases of every one, to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors. Cases of experts with fp32 weights were
recorded with one check of torch lifted: the fake kernel of ``_grouped_mm`` takes bf16 only
(torch/_meta_registrations.py `_meta_grouped_mm_common`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware.errors import UnsupportedError
from simulator import Training, simulate
from simulator.reading import read_model
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact

ORACLE = Path(__file__).parents[1] / "data" / "oracle"


FILES = ("dense", "early", "experts", "latent", "routed")


@pytest.mark.parametrize("name", FILES)
def test_peaks_and_phases(name):
    assert_exact(validate_oracle(ORACLE / f"{name}.jsonl").rows)


@pytest.mark.parametrize(
    "line", [line for name in FILES for line in read_cases(ORACLE / f"{name}.jsonl")], ids=lambda line: line["id"]
)
def test_parameters(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


def test_a_counted_family_says_that_it_has_no_graph():
    with pytest.raises(UnsupportedError, match="gemma4 is counted, not simulated"):
        simulate(read_model("gemma-4-26B-A4B"), Training(seq_len=8))
