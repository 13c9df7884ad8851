"""Families with state space layers against real PyTorch code: recorded cases to the byte, a timeline op by op.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors, without mamba-ssm and causal-conv1d. Chunks
divide the sequence or do not, or are longer. Cases of experts with fp32 weights were recorded with one check of torch
lifted: the fake kernel of ``_grouped_mm`` takes bf16 only (torch/_meta_registrations.py `_meta_grouped_mm_common`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator import simulate
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact
from tests.studies.test_validation_timelines import oracle_trace, our_trace

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
LINES = {line["id"]: line for line in read_cases(ORACLE / "hybrid.jsonl")}
RECORDED = "hybrid-mamba2h-bf16-b2-s45"


def test_peaks_and_phases():
    assert_exact(validate_oracle(ORACLE / "hybrid.jsonl").rows)


@pytest.mark.parametrize("line", LINES.values(), ids=lambda line: line["id"])
def test_parameters(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


@pytest.mark.parametrize("step", ["cold", "steady"])
def test_every_allocation_of_a_mamba2(step):
    """Each op of forward and backward that allocates is there, and so many bytes are allocated after it."""
    expected = oracle_trace(ORACLE / "timelines" / f"{RECORDED}.csv.gz", step)
    found = our_trace(simulate(*oracle_case(LINES[RECORDED])), step)
    assert [entry.op for entry in found] == [entry.op for entry in expected]
    assert [entry.live for entry in found] == [entry.live for entry in expected]
