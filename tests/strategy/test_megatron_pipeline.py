"""Megatron's pipelines: ranks against megatron-core itself, and what must hold for any of them."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.mesh import Mesh
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.report import Report
from simulator.roles import Role
from strategies.checkpointing import FullCheckpointing
from strategies.megatron import MegatronDistributedOptimizer
from strategies.megatron_pipeline import MegatronPipeline
from studies.validation import read_cases, validate_oracle
from tests.recorded import assert_exact
from tests.strategy.pipelined import assert_folded_is_unrolled, assert_repeats_stand_for_every_layer, recorded

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "megatron_pipeline.jsonl"
LINES = list(read_cases(RECORDED))
NAMES = [line["name"] for line in LINES]
LAYER = LayerSpec(AttentionSpec(heads=4, kv_heads=2, head_dim=8), FeedForwardSpec(width=48))
MODEL = ModelSpec("pipelined", "llama", hidden=32, vocab=100, max_positions=64, layers=(LAYER,) * 8)
TRAINING = Training(micro_batch=2, seq_len=16, gradient_accumulation=8, weights=BF16, implementation="megatron")


def run(pipeline: MegatronPipeline, *others, training: Training = TRAINING, model: ModelSpec = MODEL, pp: int = 2):
    return simulate(model, training, (pipeline, *others), mesh=Mesh(pp=pp))


def test_recorded_ranks_are_exact():
    rows = validate_oracle(RECORDED).rows
    assert len(rows) == 2 * len(LINES)
    assert_exact(rows[1::2])
    assert [(row.name, row.error_pct) for row in rows if row.error_pct != 0] == []


@pytest.mark.parametrize("line", LINES, ids=NAMES)
def test_what_stays_between_steps_is_as_recorded(line):
    report = recorded(line)
    assert report.steady.start_bytes == report.steady.end_bytes == line["live_at"]["begin"]
    assert report.steady.by_role.get(Role.RECEIVED, 0) == line["received_at_peak_bytes"]


@pytest.mark.parametrize("line", LINES[::5], ids=NAMES[::5])
def test_folded_is_unrolled(line):
    assert_folded_is_unrolled(recorded(line))


@pytest.mark.parametrize("line", LINES[::5], ids=NAMES[::5])
def test_repeats_stand_for_every_layer(line):
    assert_repeats_stand_for_every_layer(line)


def held_between_steps(report: Report) -> int:
    """Bytes that came, or are sent, along the pipeline and are still there when a step begins."""
    return report.steady.start_bytes - report.cold.start_bytes


def test_blocks_keep_their_last_input_and_its_gradient():
    """Each chunk that receives has both from step to step: the first of the model has none."""
    one = 2 * 16 * 32 * 2  # b * s * h * 2 bytes
    plain = Training(
        micro_batch=2, seq_len=16, gradient_accumulation=8, weights=BF16, implementation="megatron",
        optimizer=attrs.evolve(TRAINING.optimizer, name="sgd"),
    )  # fmt: skip
    for chunks, rank, receiving in ((1, 0, 0), (1, 1, 1), (2, 0, 1), (2, 1, 2), (4, 0, 3), (4, 1, 4)):
        report = run(MegatronPipeline(rank=rank, chunks=chunks), MegatronDistributedOptimizer(), training=plain)
        assert held_between_steps(report) == receiving * 2 * one


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_deallocated_outputs_never_take_more(chunks):
    for rank in (0, 1):
        kept, freed = (
            run(MegatronPipeline(rank=rank, chunks=chunks, deallocate_pipeline_outputs=flag)).steady.nbytes
            for flag in (False, True)
        )
        assert freed <= kept


def test_more_micro_batches_keep_their_losses_alone():
    """What is in flight does not grow with them; each leaves the loss that is reported."""
    few, many = (
        run(MegatronPipeline(rank=1), training=attrs.evolve(TRAINING, gradient_accumulation=count)).steady.nbytes
        for count in (8, 16)
    )
    assert 0 <= many - few <= 8 * 512


def test_a_tied_embedding_is_on_both_ends():
    untied, tied = (
        [run(MegatronPipeline(rank=rank), model=attrs.evolve(MODEL, tied_embeddings=flag)) for rank in (0, 1)]
        for flag in (False, True)
    )
    assert [report.peak.nbytes for report in tied] == [report.peak.nbytes for report in untied]
    assert tied[0].parameters < untied[0].parameters


def test_stages_may_differ_in_their_layers():
    """A layer more on a stage costs more there, and the same weights are on all ranks together."""
    even, uneven = (
        [run(MegatronPipeline(rank=rank, split=split), MegatronDistributedOptimizer()) for rank in (0, 1)]
        for split in (None, (3, 5))
    )
    assert uneven[0].peak.nbytes < even[0].peak.nbytes
    assert uneven[1].peak.nbytes > even[1].peak.nbytes


@pytest.mark.parametrize(
    ("pipeline", "pp", "message"),
    [
        (MegatronPipeline(rank=2), 2, "'rank' must be from 0 to 1"),
        (MegatronPipeline(), 1, "'pp' must be at least 2"),
        (MegatronPipeline(), 3, "'pp': 8 layers do not make 3 equal stages; take another degree, or say --pp-split"),
        (MegatronPipeline(split=(3, 4)), 2, "2 numbers of layers that add up to 8: 3,4"),
        (MegatronPipeline(chunks=2, group=7), 2, "'micro_batches'"),
    ],
)
def test_what_makes_no_pipeline_is_refused(pipeline, pp, message):
    with pytest.raises(UsageError, match=message):
        run(pipeline, pp=pp)


def test_what_was_not_compared_is_refused():
    with pytest.raises(UnsupportedError, match="full_checkpointing"):
        run(MegatronPipeline(), FullCheckpointing())
    with pytest.raises(UnsupportedError, match="implementation"):
        run(MegatronPipeline(), training=attrs.evolve(TRAINING, implementation="torchtitan"))
