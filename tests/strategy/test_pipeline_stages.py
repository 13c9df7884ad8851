"""What shares the work inside the stages of a pipeline: fully_shard, DDP, tensor parallelism, as recorded."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from hardware.dtypes import BF16, FP32
from simulator import Training, simulate
from simulator.api import simulate_ranks
from simulator.mesh import Mesh
from strategies.fsdp2 import Fsdp2
from strategies.pipeline_schedule import PipelineSchedule
from studies.validation import validate_oracle
from tests.strategy.test_pipeline import MODEL

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "pipeline_stages.jsonl"
FSDP2 = Fsdp2(param_dtype=BF16, wrap="layer+embedding+head", reshard_after_forward=False, sync="last")


def test_recorded_ranks_are_exact():
    rows = validate_oracle(RECORDED).rows
    assert [(row.name, row.error_pct) for row in rows if row.error_pct != 0] == []
    assert len(rows) > 50


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev"])
def test_ranks_share_their_parts(schedule):
    """Ranks lowered together have the same peaks and live storages as by themselves, gradients put by included."""
    training = Training(micro_batch=1, seq_len=16, gradient_accumulation=24, weights=FP32)
    mesh = Mesh(pp=4, dp_shard=2)
    ranks = [[PipelineSchedule(schedule=schedule, rank=rank), FSDP2] for rank in range(4)]
    for strategies, report in zip(ranks, simulate_ranks(MODEL, training, ranks, mesh=mesh), strict=True):
        alone = simulate(MODEL, training, strategies, mesh=mesh)
        assert (report.cold, report.steady) == (alone.cold, alone.steady)
        assert [(e.identity, e.nbytes) for e in report.live()] == [(e.identity, e.nbytes) for e in alone.live()]


def test_more_shards_keep_less():
    training = Training(micro_batch=1, seq_len=16, gradient_accumulation=4)
    kept = []
    for shards in (2, 4):
        strategies = [PipelineSchedule(rank=1), attrs.evolve(FSDP2, param_dtype=None)]
        kept.append(simulate(MODEL, training, strategies, mesh=Mesh(pp=2, dp_shard=shards)).steady.start_bytes)
    assert kept[0] > kept[1]
