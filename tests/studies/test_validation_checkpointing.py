"""Regimes of checkpointing, and frozen weights, against real PyTorch code: small recorded cases, to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors; chunks of layers are modules that call
``torch.utils.checkpoint.checkpoint`` on a loop over their layers.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.validation import validate_oracle
from tests.recorded import assert_exact

ORACLE = Path(__file__).parents[1] / "data" / "oracle"


@pytest.mark.parametrize("name", ["checkpointing", "freezing"])
def test_peaks_and_phases(name):
    assert_exact(validate_oracle(ORACLE / f"{name}.jsonl").rows)
