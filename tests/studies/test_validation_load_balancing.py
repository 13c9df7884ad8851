"""The load-balancing loss of ``output_router_logits`` against real PyTorch code: recorded cases to the byte.

Recorded as those of `test_validation_minimax`; of the padded case the mask was said not to be all ones.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator import simulate
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact
from tests.studies.test_validation_delta import phase_peaks

ORACLE = Path(__file__).parents[1] / "data" / "oracle" / "load_balancing.jsonl"


def test_peaks_and_phases():
    assert_exact(validate_oracle(ORACLE).rows)


@pytest.mark.parametrize("line", list(read_cases(ORACLE)), ids=lambda line: line["id"])
def test_the_peak_of_each_pass(line):
    peaks, steady = phase_peaks(simulate(*oracle_case(line)).program), line["steady"]
    assert peaks["forward"] == steady["peak_fwd"]
    assert max(peaks["backward"], peaks.get("recompute", 0)) == steady["peak_bwd"]
