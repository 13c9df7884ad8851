"""Whole timelines against real PyTorch code: live bytes after every op that allocates, forward and backward."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
from pathlib import Path

import attrs
import pytest

from simulator import simulate
from simulator.timeline import moments
from studies.validation import PHASES, oracle_case, read_cases
from tests.studies.test_validation import FAMILIES, FILES

FOLDERS = [path.parent / "timelines" for path in FILES]
COMPARED = ("fwd", "bwd", "recompute")
#: Steps of a report -> their iteration in a recording.
STEPS = {"cold": "it0", "steady": "it1"}


def tolerance(line):
    """Outside the layers, where recipes sum up the helper ops of positions and masks: two rows of int64 positions."""
    two_rows = 16 * line["case"]["seq"]
    return max(1024, two_rows)


def recorded():
    """(case line, timeline path) of every case of the three families that has a timeline."""
    lines = {line["id"]: line for path in FILES for line in read_cases(path)}
    found = []
    for path in (p for folder in FOLDERS for p in sorted(folder.glob("*.csv.gz")) if ".alloc." not in p.name):
        name = path.name.removeprefix("timeline_").removesuffix(".csv.gz")
        line = lines.get(name)
        if line and line["config_class"] in FAMILIES and not line["case"]["lora"]:
            found.append((line, path))
    return found


@attrs.frozen
class Entry:
    """An op that allocates, and the bytes allocated after it."""

    op: str
    live: int
    phase: str
    module: str


def oracle_trace(path, step):
    """What one iteration of a recording allocates in forward and backward."""
    with gzip.open(path.with_name(path.name.replace(".csv.gz", ".alloc.csv.gz")), "rt") as file:
        allocating = {int(row["op_index"]) for row in csv.DictReader(file) if int(row["delta_bytes"]) > 0}
    with gzip.open(path, "rt") as file:
        marks = dict(json.loads(file.readline().removeprefix("#marks ")))
        rows = list(csv.DictReader(file))
    rows = rows[marks[f"{STEPS[step]}:start"] : marks[f"{STEPS[step]}:end"]]
    return [
        Entry(row["op"].split(".")[0], int(row["live_bytes_r512"]), row["phase"], row["module"])
        for row in rows
        if row["phase"] in COMPARED and int(row["i"]) in allocating
    ]


def our_trace(report, step):
    """The same of a simulated step."""
    bindings, live, trace = report.program.bindings, getattr(report, step).start_bytes, []
    for moment in moments(getattr(report.program, step)):
        ours, phase = moment.step, PHASES[moment.step.phase]
        births = sum(int(r.storage.size.allocated(bindings)) for r in ours.births)
        live += births
        if births and phase in COMPARED:
            trace.append(Entry(ours.name.split(".")[0], live, phase, ours.module))
        live -= sum(int(r.storage.size.allocated(bindings)) for r in ours.deaths)
    return trace


def in_a_layer(entry):
    """Whether an op of a recording belongs to a decoder layer, or to backward."""
    return entry.phase != "fwd" or any(part.isdigit() for part in entry.module.split("."))


@pytest.mark.parametrize("step", sorted(STEPS))
@pytest.mark.parametrize(("line", "path"), recorded(), ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_timeline_op_by_op(line, path, step):
    expected, found = oracle_trace(path, step), our_trace(simulate(*oracle_case(line)), step)
    matcher = difflib.SequenceMatcher(a=[e.op for e in expected], b=[e.op for e in found], autojunk=False)
    pairs = [(i + k, j + k) for i, j, size in matcher.get_matching_blocks() for k in range(size)]
    missing = [expected[i] for i in sorted(set(range(len(expected))) - {i for i, _ in pairs})]
    invented = [found[j] for j in sorted(set(range(len(found))) - {j for _, j in pairs})]
    assert [entry for entry in missing if in_a_layer(entry)] == []
    assert [entry for entry in invented if entry.module != "loss_function"] == []
    off = [(expected[i], found[j]) for i, j in pairs if expected[i].live != found[j].live]
    assert [pair for pair in off if in_a_layer(pair[0])] == []
    assert [pair for pair in off if abs(pair[0].live - pair[1].live) > tolerance(line)] == []


def test_there_is_something_to_compare():
    assert any(Path(path).is_relative_to(Path(__file__).parents[1]) for _, path in recorded())
