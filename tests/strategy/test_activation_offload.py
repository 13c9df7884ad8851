"""Activations in host memory against real PyTorch code under `save_on_cpu`: peaks and what was packed, to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors; what was packed was counted in the pack hook.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError
from simulator import Mesh, Training, simulate
from strategies.activation_offload import ActivationOffload
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.fsdp2 import Fsdp2
from studies.validation import validate_oracle
from studies.validation.cases import oracle_case
from tests.recorded import assert_exact
from tests.strategies import uniform_llama

OWN = Path(__file__).parents[1] / "data" / "oracle" / "activation_offload.jsonl"
LINES = [json.loads(line) for line in OWN.read_text().splitlines()]
TRAINING = Training(seq_len=16, weights=BF16)


class TestActivationOffload(StrategyContract):
    strategy = ActivationOffload()


def test_peaks_and_phases():
    assert_exact(validate_oracle(OWN).rows)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["id"])
def test_bytes_in_host_memory(line):
    """Each saved tensor by itself, weights too."""
    model, training, strategies = oracle_case(line)
    host = simulate(model, training, strategies).host
    assert (host.pinned, host.pageable) == (line["host_saved_bytes"], 0)


def test_memory_that_is_not_pinned():
    host = simulate(uniform_llama(2), TRAINING, [ActivationOffload(pin_memory=False)]).host
    assert host.pageable > 0 == host.pinned


@pytest.mark.parametrize("others", [[FullCheckpointing()], [Fsdp2()]], ids=["checkpointing", "fsdp2"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_modelled_is_refused(others, first):
    chosen = [ActivationOffload(), *others] if first else [*others, ActivationOffload()]
    with pytest.raises(UnsupportedError, match="activation_offload is not modelled together with"):
        simulate(uniform_llama(2), TRAINING, chosen, mesh=Mesh())
