"""Time of one estimate of a rank among many, whatever their number.

Run with ``python -m pytest benchmarks --benchmark-enable``.
"""

from __future__ import annotations

import pytest

from hardware.dtypes import BF16, FP32
from simulator import Mesh, Training, simulate
from simulator.reading import read_model
from strategies.checkpointing import FullCheckpointing
from strategies.fsdp2 import Fsdp2

MODEL = read_model("llama-3.1-405b")
STRATEGIES = (FullCheckpointing(), Fsdp2(param_dtype=BF16, reduce_dtype=FP32))


@pytest.mark.parametrize("ranks", [8, 512, 16384])
def test_one_estimate_by_ranks(benchmark, ranks):
    """Goal: a 405B on 512 GPUs under 30 ms, the same for any number of ranks."""
    report = benchmark(simulate, MODEL, Training(seq_len=8192), STRATEGIES, mesh=Mesh(dp_shard=ranks))
    assert report.peak.nbytes > 0
