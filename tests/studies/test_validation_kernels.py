"""Liger's kernels and ``num_items_in_batch`` against real PyTorch code: small recorded cases, to the byte.

Recorded with torch 2.13.0, transformers 5.23.0 and Liger-Kernel 0.8.2 (ead96b618) on fake CUDA tensors: Liger's own
Python, whose Triton kernels do nothing (they allocate nothing), on a GPU of 132 multiprocessors. Its experts are sent
as many tokens each.
"""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest

from hardware.errors import UnsupportedError
from simulator import simulate
from simulator.liger import FAMILIES
from simulator.roles import Phase
from simulator.timeline import moments
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact

CASES = Path(__file__).parents[1] / "data" / "oracle" / "kernels.jsonl"
DISTRIBUTED = CASES.with_stem("kernels_distributed")
LINES = {line["id"]: line for line in read_cases(CASES)}


def test_peaks_and_phases():
    assert_exact(validate_oracle(CASES).rows)


def phase_peaks(report):
    """The most bytes of tensors, not rounded, while forward and while backward of a steady step runs."""
    program, live, peaks = report.program, 0, {"peak_fwd": 0, "peak_bwd": 0}
    for node in (program.load, program.cold, program.steady):
        for moment in moments(node):
            live += sum(birth.storage.size.nbytes(program.bindings) for birth in moment.step.births)
            name = {Phase.FORWARD: "peak_fwd", Phase.BACKWARD: "peak_bwd", Phase.RECOMPUTE: "peak_bwd"}
            if node is program.steady and moment.step.phase in name:
                peaks[name[moment.step.phase]] = max(peaks[name[moment.step.phase]], live)
            live -= sum(death.storage.size.nbytes(program.bindings) for death in moment.step.deaths)
    return peaks


@pytest.mark.parametrize("line", LINES.values(), ids=lambda line: line["id"])
def test_forward_and_backward(line):
    """Either may hide behind the other in the peak of the step."""
    assert phase_peaks(simulate(*oracle_case(line))) == {key: line["steady"][key] for key in ("peak_fwd", "peak_bwd")}


@pytest.mark.parametrize("line", LINES.values(), ids=lambda line: line["id"])
def test_parameters(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


def test_several_devices():
    """Around a Llama: FSDP1, FSDP2, HSDP, DDP and ZeroRedundancyOptimizer."""
    assert_exact(validate_oracle(DISTRIBUTED).rows)


def test_every_family_was_recorded_with_every_kernel():
    recorded = {
        (model.family, name)
        for model, training, _ in map(oracle_case, LINES.values())
        for name in training.liger.kernels
    }
    assert recorded == {(family, name) for family, known in FAMILIES.items() for name in known}


@pytest.mark.parametrize("name", ["llama-default-autocast", "nemotron-default-autocast"])
def test_before_torch_2_8_the_fused_loss_needs_more_under_autocast(name):
    """`torch.addmm` could not accumulate in fp32 yet; recorded in the same way, for the first and for the second."""
    recorded = {"llama-default-autocast": 5_147_136, "nemotron-default-autocast": 4_227_072}
    model, training, strategies = oracle_case(LINES[name])
    older = simulate(model, attrs.evolve(training, torch=(2, 7)), strategies)
    assert older.steady.nbytes == recorded[name]


def test_a_kernel_that_a_family_has_not_is_a_row_with_its_reason(tmp_path):
    line = LINES["mistral-default"]
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({**line, "case": {**line["case"], "liger": ["geglu"]}}))
    (row,) = {row.reason for row in validate_oracle(path).rows}
    assert row is not None
    assert "geglu is not for mistral" in row


def test_a_layer_without_experts_is_refused():
    line = LINES["qwen3moe-default"]
    config = {**line["config"], "mlp_only_layers": [1]}
    with pytest.raises(UnsupportedError, match="swiglu looks for experts in every layer"):
        simulate(*oracle_case({**line, "config": config}))
