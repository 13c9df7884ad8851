"""The simulator against real PyTorch code: our own committed cases, and the shared ones where they are present."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator import simulate
from studies.validation import check_bound, oracle_case, read_cases, role_difference, validate_oracle

OWN = Path(__file__).parents[1] / "data" / "oracle" / "sample.jsonl"
SHARED = Path(__file__).parents[3] / "shared" / "oracle" / "single" / "cases.jsonl"
FILES = [path for path in (OWN, SHARED) if path.exists()]
FAMILIES = {"GPT2Config", "LlamaConfig", "Gemma2Config"}


def trainings_of(path):
    """The full-training cases of the three families."""
    return [
        line
        for line in read_cases(path)
        if line["config_class"] in FAMILIES and line["case"]["mode"] == "train" and not line["case"]["lora"]
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_peaks_and_phases(path):
    """Every full-training case: 0.5 % on average, 2 % at worst, the peak in the same phase."""
    names = {line["id"] for line in trainings_of(path)}
    validation = validate_oracle(path)
    rows = [row for row in validation.rows if row.name.split(":")[0] in names]
    assert len(rows) == 2 * len(names)
    assert [row.name for row in rows if row.error_pct is None] == []
    errors = [abs(row.error_pct) for row in rows]
    assert sum(errors) / len(errors) <= 0.5
    assert max(errors) <= 2
    assert [row.name for row in rows if row.phase_expected != row.phase_simulated] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bytes_by_role_at_the_peak(path):
    for line in trainings_of(path):
        report = simulate(*oracle_case(line))
        for quantity in ("first_iteration", "steady"):
            assert role_difference(line, quantity, report) <= 0.02, (line["id"], quantity)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_parameters(path):
    for line in trainings_of(path):
        assert simulate(*oracle_case(line)).parameters == line["params_total"]


def test_nothing_is_dropped(tmp_path):
    """Cases that cannot be simulated are rows with their reason, whatever is wrong with them."""
    good = next(read_cases(OWN))
    lines = [
        good,
        {**good, "id": "infer", "case": {**good["case"], "mode": "infer"}},
        {**good, "id": "lora", "case": {**good["case"], "lora": {"r": 8}}},
        {**good, "id": "family", "config_class": "T5Config"},
        {**good, "id": "option", "case": {**good["case"], "compile": True}},
        {**good, "id": "optimizer", "case": {**good["case"], "optimizer": {"name": "lamb"}}},
        {**good, "id": "broken", "config": {"n_embd": 0}},
        {"name": "ddp/w2", "config": {}, "peak_bytes": 12, "first_step_peak_bytes": 10},
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    validation = validate_oracle(path)
    assert len(validation.rows) == 2 * len(lines)
    assert validation.summary.n == 2
    for row in validation.rows[2:]:
        assert row.error_pct is None
        assert row.simulated_bytes is None
        assert row.expected_bytes > 0
        assert row.reason
        assert "\n" not in row.reason
    data = validation.to_json_dict()
    assert set(data) == {"rows", "summary"}
    assert json.loads(json.dumps(data)) == data


CASE = '{"id": "x", "case": {}, "config_class": "GPT2Config", "config": {}, %s}'
BROKEN = {
    "cut off": ("{", "line 1"),
    "a list": ("[]", "line 1"),
    "second line": ("\n{}\n", "line 2"),
    "no peak": ('{"id": "x", "config": {}}', "recorded peak"),
    "peak missing": (CASE % '"steady": {}', "steady"),
    "peak in words": (CASE % '"steady": {"peak_r512": "much"}', "steady"),
    "negative peak": (CASE % '"prefill": {"peak_r512": -5}', "prefill"),
    "quantity in words": (CASE % '"steady": 12', "steady"),
    "case in words": ('{"id": "x", "case": "training", "steady": {"peak_r512": 1}}', "'case' and 'config'"),
    "class by number": ('{"id": "x", "case": {}, "config": {}, "config_class": 5}', "config_class"),
    "endless number": ('{"id": ' + "9" * 5000 + "}", "line 1"),
    "too deep": ("[" * 100_000, "line 1"),
    "nothing": ("\n\n", "at least one case"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_file_names_its_line_and_what_it_lacks(tmp_path, name):
    text, hint = BROKEN[name]
    path = tmp_path / "cases.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=re.escape(hint)):
        validate_oracle(path)


@pytest.mark.parametrize("bound", [-1.0, float("nan"), float("inf")])
def test_a_bound_that_means_nothing_is_refused(bound):
    with pytest.raises(UsageError, match="max-mean"):
        check_bound("max-mean", bound)


def test_an_option_that_is_not_known_is_refused():
    line = next(read_cases(OWN))
    with pytest.raises(UnsupportedError, match="sequence_packing"):
        oracle_case({**line, "case": {**line["case"], "sequence_packing": True}})


NOT_SIMULATED = {
    "selective checkpointing": {"checkpointing": "selective"},
    "another device": {"device": "cpu"},
    "without the engine's accumulation": {"emulate": False},
    "a mask of another kind": {"attention_mask": "packed"},
    "adapters": {"lora": {"r": 8}},
}


@pytest.mark.parametrize("name", sorted(NOT_SIMULATED))
def test_a_value_that_changes_memory_is_refused_not_rounded(name):
    line = next(read_cases(OWN))
    (key,) = NOT_SIMULATED[name]
    with pytest.raises(UnsupportedError, match=key):
        oracle_case({**line, "case": {**line["case"], **NOT_SIMULATED[name]}})


def test_our_own_error_is_a_row_and_does_not_count(monkeypatch):
    def broken(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("studies.validation.compare.simulate", broken)
    validation = validate_oracle(OWN)
    assert {row.reason for row in validation.rows} == {"our error: RuntimeError: two lines"}
    assert validation.summary.n == 0
    assert validation.summary.unsupported == len(validation.rows)
    assert validation.summary.mean_abs_error_pct is None


def test_training_is_not_compared_with_what_inference_recorded(tmp_path):
    line = next(read_cases(OWN))
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({**line, "prefill": line["steady"]}))
    rows = {row.name.split(":")[1]: row for row in validate_oracle(path).rows}
    assert rows["steady"].error_pct == 0
    assert rows["prefill"].error_pct is None


def test_the_error_has_a_sign(tmp_path):
    line = next(read_cases(OWN))
    peak = line["steady"]["peak_r512"]
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({**line, "steady": {**line["steady"], "peak_r512": 2 * peak}}))
    row = next(row for row in validate_oracle(path).rows if row.name.endswith(":steady"))
    assert row.error_pct == -50
    assert validate_oracle(path).summary.worst_abs_error_pct == 50
