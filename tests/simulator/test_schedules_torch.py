"""Orders against those of torch.distributed.pipelining, action by action.

Recorded by running its order generators, without communication; an action reads stage, kind, micro-batch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simulator.schedules import schedule
from simulator.schedules.replay import orders
from simulator.schedules.tree import Kind

RECORDED = Path(__file__).parents[1] / "data" / "schedules" / "torch_2.13.jsonl"
LINES = [json.loads(line) for line in RECORDED.read_text().splitlines()]


def identity(line):
    return "{schedule}-pp{pp}-m{micro_batches}-v{chunks}".format(**line)


def torchs(line):
    """The recorded orders, pairs that overlap as two actions, with one slip corrected."""
    found = [
        order.translate(str.maketrans(";()", "   ")).replace("OVERLAP_F_B", "").split() for order in line["orders"]
    ]
    if line["schedule"] == "1f1b":
        # `Schedule1F1B._get_pipeline_order` numbers the last rank's forwards from 1 on; its `_step_microbatches`,
        # which is what runs, from 0.
        stage = f"{line['pp'] - 1}F"
        found[-1] = [f"{stage}{int(a.removeprefix(stage)) - 1}" if a.startswith(stage) else a for a in found[-1]]
    return found


@pytest.mark.parametrize("line", LINES, ids=identity)
def test_orders(line):
    pp, micro_batches, chunks = line["pp"], line["micro_batches"], line["chunks"]
    interleaved = chunks > 1 and line["schedule"] in ("interleaved_1f1b", "zb_h1")
    # torch's groups: as many as there are whole ones of pp, all of the same size
    group = micro_batches // max(1, micro_batches // pp) if interleaved else None
    s = schedule(line["schedule"], pp, micro_batches, chunks, group)
    mine = [
        [f"{s.stage(rank, chunk)}{Kind(kind).name}{number}" for kind, chunk, number, _ in order.tolist()]
        for rank, order in enumerate(orders(s))
    ]
    assert mine == torchs(line)


@pytest.mark.parametrize("line", [line for line in LINES if line["schedule"] == "dualpipev"], ids=identity)
def test_the_same_actions_overlap(line):
    s = schedule("dualpipev", line["pp"], line["micro_batches"])
    for order, recorded in zip(orders(s), line["orders"], strict=True):
        assert order[:, 3].sum() == recorded.count("OVERLAP_F_B")
        together = [word.startswith("(") for word in recorded.replace(";", " ").split()]
        assert order[:, 3].astype(bool).tolist() == together


def test_all_schedules_are_there():
    assert {line["schedule"] for line in LINES} == {"gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "zbv", "dualpipev"}
