"""Offloading against real runs of DeepSpeed 0.19.8 on small models: every phase, and what is in host memory.

Recorded with the fake process group on CPU tensors; those that DeepSpeed makes for the host were told apart by the
attributes that hold them and the functions that make them, and what ZeRO-3 fetches from the host was copied as from
there. The optimizer allocates nothing on the device, so its phase is left out.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError
from simulator import Mesh, Optimizer, Training, simulate
from strategies.contract import StrategyContract
from strategies.deepspeed.zero3 import DeepSpeedZero3
from strategies.deepspeed.zero12 import DeepSpeedZero1, DeepSpeedZero2
from tests.strategies import uniform_llama
from tests.strategy.test_deepspeed_phases import phases, recorded_report

LINES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "oracle" / "offload.jsonl").read_text().splitlines()
]


class TestOffloadedZero2(StrategyContract):
    strategy = DeepSpeedZero2(reduce_bucket_size=3000, offload_optimizer="cpu")
    mesh = Mesh(dp_shard=4)


class TestOffloadedZero3(StrategyContract):
    strategy = DeepSpeedZero3(reduce_bucket_size=3000, stage3_prefetch_bucket_size=5000, offload_optimizer="cpu")
    mesh = Mesh(dp_shard=4)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["name"])
def test_every_phase_of_real_runs(line):
    report = recorded_report(line["config"])
    found = phases(report.program)
    for step in ("cold", "steady"):
        assert {phase: found[step].get(phase, 0) for phase in line[step]} == line[step]
    assert report.host.nbytes == line["host"]


def test_the_papers_arithmetic():
    """Ren et al., section 3: master weights, momentum and variance are the host's."""
    model = uniform_llama(2)
    training = Training(seq_len=4, weights=BF16, optimizer=Optimizer(name="adamw"))
    plain, offloaded = (
        simulate(model, training, [DeepSpeedZero2(offload_optimizer=place)], mesh=Mesh(dp_shard=2))
        for place in ("none", "cpu")
    )
    assert plain.host.nbytes == 0
    freed = plain.steady.start_bytes - offloaded.steady.start_bytes
    assert freed < 12 * plain.parameters / 2 < offloaded.host.nbytes


def test_memory_that_is_not_pinned():
    training = Training(seq_len=4, weights=BF16)
    pinned, pageable = (
        simulate(uniform_llama(2), training, [DeepSpeedZero1(offload_optimizer="cpu", pin_memory=pin)]).host
        for pin in (True, False)
    )
    assert pinned.nbytes == pageable.nbytes
    assert pinned.pinned > 0 == pageable.pinned


@pytest.mark.parametrize(
    ("strategy", "optimizer", "reason"),
    [
        (
            DeepSpeedZero2(offload_optimizer="cpu"),
            "sgd",
            "'offload_optimizer' cpu of deepspeed_zero2 runs adam and adamw",
        ),
        (
            DeepSpeedZero3(offload_optimizer="cpu", contiguous_gradients=False),
            "adamw",
            "'offload_optimizer' without 'contiguous_gradients'",
        ),
        (DeepSpeedZero1(offload_optimizer="cpu", grad_accum_dtype=FP32), "adamw", "'offload_optimizer' with"),
    ],
)
def test_what_is_not_modelled_is_refused(strategy, optimizer, reason):
    training = Training(seq_len=4, weights=BF16, optimizer=Optimizer(name=optimizer))
    with pytest.raises(UnsupportedError, match=reason):
        simulate(uniform_llama(2), training, [strategy], mesh=Mesh(dp_shard=2))
