"""Whole timelines against real PyTorch code: live bytes after every op that allocates, forward and backward."""

from __future__ import annotations

import csv
import difflib
import gzip
import json
from pathlib import Path

import pytest

from simulator import simulate
from simulator.timeline import moments
from studies.validation import PHASES, oracle_case, read_cases
from tests.studies.test_validation import FAMILIES, FILES

FOLDERS = [path.parent / "timelines" for path in FILES]
COMPARED = ("fwd", "bwd", "recompute")
#: Small helper ops before the layers that recipes sum up: positions and masks, at most a few KiB here.
TOLERANCE = 8 * 1024


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


def oracle_trace(path):
    """(op, live bytes) after every allocating op of the first iteration."""
    with gzip.open(path.with_name(path.name.replace(".csv.gz", ".alloc.csv.gz")), "rt") as file:
        allocating = {int(row["op_index"]) for row in csv.DictReader(file) if int(row["delta_bytes"]) > 0}
    with gzip.open(path, "rt") as file:
        marks = dict(json.loads(file.readline().removeprefix("#marks ")))
        rows = list(csv.DictReader(file))
    rows = rows[marks["it0:start"] : marks["it0:end"]]
    return [
        (row["op"].split(".")[0], int(row["live_bytes_r512"]))
        for row in rows
        if row["phase"] in COMPARED and int(row["i"]) in allocating
    ]


def our_trace(report):
    """The same of the simulated cold step."""
    bindings, live, trace = report.program.bindings, report.cold.start_bytes, []
    for moment in moments(report.program.cold):
        births = sum(int(r.storage.size.allocated(bindings)) for r in moment.step.births)
        live += births
        if births and PHASES[moment.step.phase] in COMPARED:
            trace.append((moment.step.name.split(".")[0], live))
        live -= sum(int(r.storage.size.allocated(bindings)) for r in moment.step.deaths)
    return trace


@pytest.mark.parametrize(("line", "path"), recorded(), ids=lambda value: value["id"] if isinstance(value, dict) else "")
def test_timeline_op_by_op(line, path):
    expected, found = oracle_trace(path), our_trace(simulate(*oracle_case(line)))
    matcher = difflib.SequenceMatcher(a=[op for op, _ in expected], b=[op for op, _ in found], autojunk=False)
    matched = [(expected[i + k], found[j + k]) for i, j, size in matcher.get_matching_blocks() for k in range(size)]
    assert len(found) - len(matched) <= 2
    assert len(expected) - len(matched) <= 20
    off = [pair for pair in matched if abs(pair[0][1] - pair[1][1]) > TOLERANCE]
    assert off == []


def test_there_is_something_to_compare():
    assert any(Path(path).is_relative_to(Path(__file__).parents[1]) for _, path in recorded())
