"""Time of one estimate, whatever the depth and the number of micro-batches.

Run with ``python -m pytest benchmarks --benchmark-enable``.
"""

from __future__ import annotations

import attrs
import pytest

from hardware.dtypes import BF16
from simulator import Training, simulate
from simulator.reading import read_model

MODEL = read_model("llama-3.1-405b")
TRAINING = Training(weights=BF16, seq_len=8192)


def with_layers(count):
    return attrs.evolve(MODEL, layers=MODEL.layers[:1] * count)


@pytest.mark.parametrize("layers", [4, 126, 400])
def test_one_estimate_by_depth(benchmark, layers):
    """Goal: under 20 ms at 126 layers, within 1.5x for 4 and for 400."""
    report = benchmark(simulate, with_layers(layers), TRAINING)
    assert report.peak.nbytes > 0


@pytest.mark.parametrize("micro_batches", [1, 4096])
def test_one_estimate_by_micro_batches(benchmark, micro_batches):
    """Goal: within 1.5x of each other."""
    report = benchmark(simulate, MODEL, attrs.evolve(TRAINING, gradient_accumulation=micro_batches))
    assert report.peak.nbytes > 0


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-ai/DeepSeek-V3",
        "moonshotai/Kimi-K2-Instruct",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "Qwen/Qwen3-235B-A22B",
    ],
)
def test_one_estimate_of_unlike_layers(benchmark, name):
    """Goal: under 20 ms, dense layers before experts and hybrids without a pattern included."""
    model = read_model(name)
    report = benchmark(simulate, model, Training(weights=BF16, seq_len=4096, attention="eager"))
    assert report.peak.nbytes > 0
