"""Mixtures of experts: what is built, what is refused."""

from __future__ import annotations

import attrs
import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.reading import spec_from_class
from simulator.workload import Optimizer

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_experts_are_counted_not_built():
    """The number of experts changes bytes, not the size of the graph that is built."""
    few, many = (spec_from_class("MixtralConfig", {**SMALL, "num_local_experts": n}, "m") for n in (2, 512))
    built = [len(simulate(model, Training(seq_len=8)).plan.graph.ops) for model in (few, many)]
    assert built[0] == built[1]


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_implementations_differ_in_memory_and_not_in_parameters(implementation):
    """Weights per token copy cost most; the loop over experts keeps a row per copy as the grouped product does."""
    model = spec_from_class("MixtralConfig", SMALL, "m")
    step = Training(seq_len=512, optimizer=Optimizer(name="sgd"))
    grouped, other = (simulate(model, attrs.evolve(step, experts=way)) for way in ("grouped_mm", implementation))
    assert grouped.parameters == other.parameters
    assert grouped.peak.nbytes != other.peak.nbytes


def test_rows_that_the_kernel_refuses():
    model = spec_from_class("MixtralConfig", {**SMALL, "intermediate_size": 30}, "m")
    with pytest.raises(UnsupportedError, match="multiple of 4 with weights of"):
        simulate(model, Training(seq_len=8))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [("Mixtral", "router_jitter_noise", 0.1), ("DeepseekV3", "output_router_logits", True)],
)
def test_router_options_are_refused(family, key, value):
    with pytest.raises(UnsupportedError, match=f"{key}=.* is not modelled"):
        spec_from_class(f"{family}Config", {key: value}, "m")


def test_more_experts_per_token_than_experts():
    with pytest.raises(UsageError, match="num_experts_per_tok must be at most num_local_experts"):
        spec_from_class("MixtralConfig", {"num_experts_per_tok": 9}, "m")
