"""Pipelines by the name of their schedule: the orders that torch runs, and few turns that stand for many."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.api import simulate_ranks
from simulator.mesh import Mesh
from simulator.pipelines.order import rank_order
from simulator.pipelines.pipeline import Action, Turns
from simulator.reading import read_model
from simulator.report import Report
from simulator.roles import Role
from simulator.schedules.tree import flat
from simulator.timeline import timeline
from strategies.pipeline import PipelineParallel
from strategies.pipeline_schedule import LOOPS, PipelineSchedule, usual_split
from tests.strategies import pipeline_ranks
from tests.strategy.pipelined import recorded
from tests.strategy.test_pipeline import LINES, MODEL, TRAINING

#: The oracle's schedules, torch's classes without ``Schedule``.
RECORDED = {
    "GPipe": "gpipe",
    "1F1B": "1f1b",
    "Interleaved1F1B": "interleaved",
    "InterleavedZeroBubble": "zb-h1",
    "ZBVZeroBubble": "zbv",
}
LAYERS = len(MODEL.layers)


def written_out(pipeline: PipelineSchedule, pp: int, micro_batches: int) -> tuple[Action, ...]:
    """Every action of a rank, from its schedule's tree."""
    order = flat(pipeline.made_for(pp, micro_batches).tree(pipeline.rank)).tolist()
    return tuple(Action("FBIW"[kind], number, chunk) for kind, chunk, number, _ in order)


def explicit(pipeline: PipelineSchedule, pp: int, micro_batches: int) -> PipelineParallel:
    """The same rank with every action written out."""
    made = pipeline.made_for(pp, micro_batches)
    return PipelineParallel(
        cuts=pipeline.cuts(LAYERS, made.stages),
        stages=tuple(made.stage(pipeline.rank, chunk) for chunk in range(made.chunks)),
        order=written_out(pipeline, pp, micro_batches),
        runtime=LOOPS[pipeline.known_as],
    )


def run(strategy, pp: int, micro_batches: int) -> Report:
    training = attrs.evolve(TRAINING, gradient_accumulation=micro_batches)
    return simulate(MODEL, training, [strategy], mesh=Mesh(pp=pp))


@pytest.mark.parametrize("line", LINES, ids=[line["name"] for line in LINES])
def test_orders_are_those_that_torch_ran(line):
    config = line["config"]
    schedule = RECORDED[config["schedule"]]
    pipeline = PipelineSchedule(schedule=schedule, virtual_stages=config.get("virtual"), rank=config["stage"])
    made = pipeline.made_for(config["pp"], config["microbatches"])
    whole = recorded(line).plan.pipeline
    assert whole is not None
    assert tuple(made.stage(pipeline.rank, chunk) for chunk in range(made.chunks)) == tuple(line["stages"])
    assert written_out(pipeline, config["pp"], config["microbatches"]) == whole.order


@settings(max_examples=60, deadline=None)
@given(pipeline_ranks(LAYERS, most=40))
def test_few_turns_stand_for_many(drawn):
    """A repeated turn leaves the same peaks, roles and live storages as all actions written out."""
    pipeline, pp, micro_batches = drawn
    few, all_of_them = run(pipeline, pp, micro_batches), run(explicit(*drawn), pp, micro_batches)
    for one, other in ((few.cold, all_of_them.cold), (few.steady, all_of_them.steady)):
        assert (one.nbytes, one.start_bytes, one.end_bytes) == (other.nbytes, other.start_bytes, other.end_bytes)
        assert one.by_role == other.by_role
        assert sum(live.nbytes for live in few.live(one)) == one.nbytes
        assert few.layer_of(one) == all_of_them.layer_of(other)
    parts = {"load": few.program.load, "cold": few.program.cold, "steady": few.program.steady}
    unrolled = timeline(parts, few.program.bindings)
    assert unrolled.total[unrolled.marks["steady"] :].max() == few.steady.nbytes
    losses = 512 * micro_batches  # all that a timeline may leave out
    drawn_in_part = few.timeline()
    assert -losses <= drawn_in_part.total[drawn_in_part.marks["steady"] :].max() - few.steady.nbytes <= 0


@settings(max_examples=100, deadline=None)
@given(pipeline_ranks(64, most=600))
def test_orders_with_turns_are_whole(drawn):
    pipeline, pp, micro_batches = drawn
    order = rank_order(pipeline.made_for(pp, micro_batches), pipeline.rank)
    assert renumbered(order) == list(written_out(*drawn))


def renumbered(order: tuple[Action | Turns, ...]) -> list[Action]:
    """Every action, where each kind takes a chunk's micro-batches one after the other."""
    counts: dict[tuple[str, int], int] = {}
    found = []
    for part in order:
        for action in part.actions * part.count if isinstance(part, Turns) else (part,):
            kinds = "IW" if action.kind == "B" else action.kind  # a whole backward is one for both
            number = counts.get((kinds[0], action.chunk), 0)
            counts |= {(kind, action.chunk): counts.get((kind, action.chunk), 0) + 1 for kind in kinds}
            found.append(Action(action.kind, number, action.chunk))
    return found


@settings(max_examples=8, deadline=None)
@given(pipeline_ranks(LAYERS, most=24))
def test_ranks_simulated_together_are_as_by_themselves(drawn):
    pipeline, pp, micro_batches = drawn
    training = attrs.evolve(TRAINING, gradient_accumulation=micro_batches)
    every = [attrs.evolve(pipeline, rank=rank) for rank in range(pp)]
    for rank, report in zip(
        every, simulate_ranks(MODEL, training, [[r] for r in every], mesh=Mesh(pp=pp)), strict=True
    ):
        alone = run(rank, pp, micro_batches)
        assert (report.cold, report.steady) == (alone.cold, alone.steady)
        assert [(e.identity, e.nbytes) for e in report.live()] == [(e.identity, e.nbytes) for e in alone.live()]


def test_earlier_ranks_hold_more_micro_batches():
    held = [run(PipelineSchedule(rank=rank), 4, 8).steady.by_role[Role.ACTIVATION] for rank in range(1, 3)]
    assert held[0] > held[1]


@given(st.integers(1, 200), st.integers(1, 200))
def test_layers_are_dealt_out_as_torchtitan_does(layers, stages):
    if layers < stages:
        with pytest.raises(UsageError, match=f"of the model's {layers} layers"):
            usual_split(layers, stages)
        return
    split = usual_split(layers, stages)
    assert sum(split) == layers
    assert min(split) >= 1
    assert max(split) - min(split) <= 2


def test_llama_405b_is_split_evenly():
    assert usual_split(126, 16) == [7, *[8] * 14, 7]


@pytest.mark.parametrize(
    ("options", "micro_batches", "said"),
    [
        ({"schedule": "1f1b"}, 3, "'gradient-accumulation' of 1f1b must be at least its 4 stages: 3; take 4"),
        ({"schedule": "1f1b", "virtual_stages": 2}, 8, "'virtual-stages' of 1f1b must be 1"),
        ({"schedule": "interleaved"}, 9, "must be a multiple of its 2 rounds of 4 ranks: 9; take 8 or 12"),
        ({"schedule": "zb-h1", "virtual_stages": 1}, 8, "'virtual-stages' of zb_h1 must be at least 2"),
        ({"schedule": "dualpipev"}, 6, "'gradient-accumulation' of dualpipev must be at least its 8 stages: 6"),
        ({"schedule": "zig"}, 8, "no schedule named 'zig'"),
        ({"split": (2, 2, 2)}, 8, "must have a number for each of 4 stages: 2,2,2"),
        ({"split": (2, 2, 2, 1)}, 8, "must add up to the model's 8 layers: 2,2,2,1 = 7"),
        ({"split": (4, 4, 0, 0)}, 8, "must leave every stage a layer"),
    ],
)
def test_wrong_numbers_are_one_line(options, micro_batches, said):
    with pytest.raises(UsageError, match=said):
        run(PipelineSchedule(**options), 4, micro_batches)


def test_dualpipe_is_refused():
    with pytest.raises(UnsupportedError, match=r"dualpipe is not in torch.distributed.pipelining"):
        run(PipelineSchedule(schedule="dualpipe"), 4, 8)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("mistralai/Mixtral-8x7B-v0.1", "zbv"),
        ("google/gemma-2-9b", "zbv"),
        ("Qwen/Qwen3-30B-A3B", "zb_h1"),
        ("Qwen/Qwen3-30B-A3B", "dualpipev"),
    ],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_split_backward_keeps_has_one_name_in_all_layers(name, schedule, rank):
    """The weights' part frees what the inputs' part has captured, though the last layer adds up once more."""
    model = read_model(name)
    model = attrs.evolve(model, layers=model.layers[:12])
    training = Training(seq_len=16, gradient_accumulation=4, attention="eager")
    report = simulate(model, training, [PipelineSchedule(schedule=schedule, rank=rank)], mesh=Mesh(pp=2))
    for step in (report.cold, report.steady):
        assert sum(live.nbytes for live in report.live(step)) == step.nbytes
