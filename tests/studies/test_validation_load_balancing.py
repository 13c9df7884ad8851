"""The load-balancing loss of ``output_router_logits`` against real PyTorch code: recorded cases to the byte.

Recorded as those of `test_validation_minimax`; of the padded case the mask was said not to be all ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator import simulate
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.studies.test_validation_delta import phase_peaks

ORACLE = Path(__file__).parents[1] / "data" / "oracle" / "load_balancing.jsonl"


def test_peaks_and_phases():
    rows = validate_oracle(ORACLE).rows
    assert [row.name for row in rows if row.error_pct != 0] == []
    assert [row.name for row in rows if row.phase_expected != row.phase_simulated] == []


@pytest.mark.parametrize("line", read_cases(ORACLE), ids=lambda line: line["id"])
def test_the_peak_of_each_pass(line):
    peaks, steady = phase_peaks(simulate(*oracle_case(line)).program), line["steady"]
    assert peaks["forward"] == steady["peak_fwd"]
    assert max(peaks["backward"], peaks.get("recompute", 0)) == steady["peak_bwd"]
