"""Early families and latent attention against real PyTorch code: small recorded cases of every family, to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware.errors import UnsupportedError
from simulator import Training, simulate
from simulator.reading import read_model
from studies.validation import validate_oracle

ORACLE = Path(__file__).parents[1] / "data" / "oracle"


@pytest.mark.parametrize("name", ["early", "latent"])
def test_peaks_and_phases(name):
    rows = validate_oracle(ORACLE / f"{name}.jsonl").rows
    assert [row.name for row in rows if row.error_pct != 0] == []
    assert [row.name for row in rows if row.phase_expected != row.phase_simulated] == []


def test_a_counted_family_says_that_it_has_no_graph():
    with pytest.raises(UnsupportedError, match="gpt_oss is counted, not simulated"):
        simulate(read_model("gpt-oss-20b"), Training(seq_len=8))
