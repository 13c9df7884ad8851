"""Gated delta nets against real PyTorch code: small recorded cases, to the byte.

Recorded as those of `test_validation_families`, by the PyTorch functions that run without flash-linear-attention and
causal-conv1d. Of the padded cases the mask was said not to be all ones.
"""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from simulator import simulate
from simulator.timeline import moments
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact

ORACLE = Path(__file__).parents[1] / "data" / "oracle"
LINES = list(read_cases(ORACLE / "delta.jsonl"))
PADDED = list(read_cases(ORACLE / "delta_padded.jsonl"))


def test_peaks_and_phases():
    rows = validate_oracle(ORACLE / "delta.jsonl").rows
    assert len(rows) == 2 * len(LINES)
    assert_exact(rows)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["id"])
def test_parameters_and_the_peak_of_each_pass(line):
    report = simulate(*oracle_case(line))
    assert report.parameters == line["params_total"]
    peaks = phase_peaks(report.program)
    steady = line["steady"]
    assert max(peaks["backward"], peaks.get("recompute", 0)) == steady["peak_bwd"]
    if not line["case"]["checkpointing"]:  # whose forward keeps nothing for nodes that no gradient reaches
        assert peaks["forward"] == steady["peak_fwd"]


def phase_peaks(program):
    """The most bytes alive, not rounded, in each phase of the steady step."""
    live, peaks = 0, {}
    for part in ("load", "cold", "steady"):
        for moment in moments(getattr(program, part)):
            live += sum(int(r.storage.size.nbytes(program.bindings)) for r in moment.step.births)
            if part == "steady":
                phase = moment.step.phase.value
                peaks[phase] = max(peaks.get(phase, 0), live)
            live -= sum(int(r.storage.size.nbytes(program.bindings)) for r in moment.step.deaths)
    return peaks


@pytest.mark.parametrize("line", PADDED, ids=lambda line: line["id"])
def test_padding(line):
    model, training, *rest = oracle_case(line)
    report = simulate(model, attrs.evolve(training, attention_mask="padded"), *rest)
    assert report.steady.nbytes == line["steady"]["peak_r512"]
    assert report.cold.nbytes == line["first_iteration"]["peak_r512"]
