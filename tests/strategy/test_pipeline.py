"""Pipelines: ranks against real torch.distributed.pipelining, and what must hold for any order."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import attrs
import pytest

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.mesh import Mesh
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.pipelines.pipeline import Action
from simulator.report import Report
from simulator.roles import Role
from strategies.checkpointing import FullCheckpointing
from strategies.ddp import Ddp
from strategies.fsdp1 import Fsdp1
from strategies.fsdp2 import Fsdp2
from strategies.pipeline import PipelineParallel
from studies.validation import read_cases, validate_oracle
from tests.strategy.pipelined import assert_folded_is_unrolled, assert_repeats_stand_for_every_layer, recorded

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "pipeline.jsonl"
LINES = list(read_cases(RECORDED))
#: Those with data and tensor parallel ranks inside stages, too.
EVERY = [*LINES, *read_cases(RECORDED.with_stem("pipeline_stages"))]
every_rank = pytest.mark.parametrize("line", EVERY, ids=[line["name"] for line in EVERY])
LAYER = LayerSpec(AttentionSpec(heads=4, kv_heads=2, head_dim=8), FeedForwardSpec(width=48))
MODEL = ModelSpec("pipelined", "llama", hidden=32, vocab=128, max_positions=64, layers=(LAYER,) * 8)
TRAINING = Training(micro_batch=2, seq_len=16, gradient_accumulation=4, weights=BF16, implementation="torchtitan")


def gpipe(micro_batches: int) -> tuple[Action, ...]:
    return tuple(Action(kind, number) for kind in "FB" for number in range(micro_batches))


def one_f_one_b(ahead: int, micro_batches: int) -> tuple[Action, ...]:
    """`ahead` forwards, then backward and forward by turns; the backward of the last ones ends it."""
    order = [Action("F", number) for number in range(ahead)]
    for number in range(micro_batches):
        order.append(Action("B", number))
        if number + ahead < micro_batches:
            order.append(Action("F", number + ahead))
    return tuple(order)


def rank(stage: int, order: tuple[Action, ...] = gpipe(4), runtime: str = "gpipe") -> PipelineParallel:
    return PipelineParallel(cuts=(0, 2, 5, 8), stages=(stage,), order=order, runtime=runtime)


def run(*strategies, training: Training = TRAINING, model: ModelSpec = MODEL) -> Report:
    return simulate(model, training, strategies, mesh=Mesh(pp=3))


def test_recorded_ranks_are_exact():
    rows = validate_oracle(RECORDED).rows
    assert [(row.name, row.error_pct) for row in rows if row.error_pct != 0] == []
    # what neighbours on one rank hand to each other in the first step, the recorder calls a receive buffer as well
    apart = {f"{line['name']}:steady" for line in LINES if 1 not in {abs(b - a) for a, b in pairwise(line["stages"])}}
    assert len(apart) > 20
    assert {row.name for row in rows if any(row.role_errors_pct.values())} & apart == set()


@every_rank
def test_what_stays_between_steps_is_as_recorded(line):
    report = recorded(line)
    assert report.steady.start_bytes == report.steady.end_bytes == line["live_at"]["begin"]


@every_rank
def test_folded_is_unrolled(line):
    assert_folded_is_unrolled(recorded(line))


@every_rank
def test_repeats_stand_for_every_layer(line):
    assert_repeats_stand_for_every_layer(line)


def test_1f1b_holds_no_more_micro_batches_than_are_ahead():
    """One micro-batch more in flight costs the same each time, in whichever schedule."""

    def activations(order, runtime):
        return run(rank(1, order, runtime)).steady.by_role[Role.ACTIVATION]

    one, two, three = (activations(one_f_one_b(ahead, 4), "1f1b") for ahead in (1, 2, 3))
    assert three - two == two - one > 0
    assert activations(gpipe(4), "gpipe") > three


def test_zeroed_gradients_are_not_made_anew():
    zeroed = attrs.evolve(TRAINING, zero_grad="zero")
    report = run(rank(1), training=zeroed)
    assert report.steady.start_bytes == report.steady.end_bytes
    assert report.steady.start_bytes > run(rank(1)).steady.start_bytes


def test_parameters_are_those_of_the_whole_model():
    assert run(rank(0)).parameters == simulate(MODEL, TRAINING).parameters


def test_a_tied_weight_is_in_both_stages():
    """Each end has a copy of its own, as in a model whose weights are not tied; the model has it once."""
    tied = attrs.evolve(MODEL, tied_embeddings=True)
    for stage in (0, 2):
        assert run(rank(stage), model=tied).steady == run(rank(stage)).steady
    assert run(rank(0)).parameters - run(rank(0), model=tied).parameters == MODEL.vocab * MODEL.hidden


def test_layers_have_their_numbers_in_the_whole_model():
    assert run(rank(1)).layer_of() in range(2, 5)


def test_checkpointed_layers_need_less():
    assert run(rank(0), FullCheckpointing()).steady.nbytes < run(rank(0)).steady.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cuts": (0, 2, 5)}, "'cuts' must go from 0 to the number of layers, 8"),
        ({"cuts": (0, 5, 5, 8)}, "'cuts' must leave every stage a layer"),
        ({"stages": (3,)}, "'stages' must be among the 3"),
        ({"order": gpipe(3)}, "'order' must run each of 4 micro-batches"),
        ({"order": (Action("B", 0), *gpipe(4)[:-1])}, "'order' must run each of 4 micro-batches"),
    ],
)
def test_wrong_options(change, message):
    with pytest.raises(UsageError, match=message):
        run(attrs.evolve(rank(0), **change))


def test_what_is_not_modelled_is_refused():
    with pytest.raises(UnsupportedError, match="pipeline goes first"):
        run(FullCheckpointing(), rank(0))
    with pytest.raises(UnsupportedError, match="a pipeline with fsdp1 in its stages"):
        run(rank(0), Fsdp1())
    split = tuple(Action(kind, number) for number in range(4) for kind in "FIW")
    with pytest.raises(UnsupportedError, match="ddp is not told of weights' gradients"):
        run(rank(1, split, "runtime"), Ddp())
    with pytest.raises(UnsupportedError, match="checkpoints in a backward split in two"):
        run(rank(1, split, "runtime"), FullCheckpointing())
    with pytest.raises(UnsupportedError, match="'reshard_after_forward' true of fsdp2 in a pipeline"):
        run(rank(0), Fsdp2())
    with pytest.raises(UnsupportedError, match="not cut into pipeline stages"):
        run(rank(0), training=attrs.evolve(TRAINING, implementation="torchtune"))
