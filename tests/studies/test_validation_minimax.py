"""MiniMax-01 against real PyTorch code: recorded cases to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors. Blocks of lightning attention divide the
sequence or do not, leave one token, or are longer. Cases of experts with fp32 weights were recorded with one check of
torch lifted: the fake kernel of ``_grouped_mm`` takes bf16 only (torch/_meta_registrations.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator import simulate
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact
from tests.studies.test_validation_delta import phase_peaks

ORACLE = Path(__file__).parents[1] / "data" / "oracle" / "minimax.jsonl"


def test_peaks_and_phases():
    assert_exact(validate_oracle(ORACLE).rows)


@pytest.mark.parametrize("line", list(read_cases(ORACLE)), ids=lambda line: line["id"])
def test_parameters_and_the_peak_of_each_pass(line):
    report = simulate(*oracle_case(line))
    assert report.parameters == line["params_total"]
    peaks, steady = phase_peaks(report.program), line["steady"]
    assert max(peaks["backward"], peaks.get("recompute", 0)) == steady["peak_bwd"]
    if not line["case"]["checkpointing"]:  # whose forward keeps nothing for nodes that no gradient reaches
        assert peaks["forward"] == steady["peak_fwd"]
