"""Lightning attention: properties of every model, what long sequences cost, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from hardware.dtypes import BF16
from hardware.errors import UsageError
from simulator import Training
from simulator.model import LightningSpec
from simulator.plan import make_plan
from simulator.reading import spec_from_class
from tests.simulator import test_properties as properties
from tests.strategies import lightning_models, trainings

some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@some
@given(lightning_models(), trainings(), properties.choices)
def test_fold_is_unroll(model, training, strategies):
    properties.test_fold_is_unroll.hypothesis.inner_test(model, training, strategies)


@some
@given(lightning_models(), trainings(), properties.choices)
def test_repeats_stand_for_every_layer(model, training, strategies):
    properties.test_repeats_stand_for_every_layer.hypothesis.inner_test(model, training, strategies)


@some
@given(lightning_models(), trainings(), properties.choices)
def test_a_steady_step_leaks_nothing(model, training, strategies):
    properties.test_a_steady_step_leaks_nothing.hypothesis.inner_test(model, training, strategies)


def test_length_costs_nothing():
    """A hundred thousand tokens build the graph of two thousand."""
    model = spec_from_class("MiniMaxConfig", {"num_hidden_layers": 4}, "m")
    built = [len(make_plan(model, Training(seq_len=length, weights=BF16)).graph.ops) for length in (2000, 100_000)]
    assert built[0] == built[1]


def test_a_model_without_rotary_attention_is_refused():
    with pytest.raises(UsageError, match="layer_types must have one full_attention"):
        spec_from_class("MiniMaxConfig", {"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}, "m")


def test_heads_have_a_largest_width():
    with pytest.raises(UsageError, match="heads x head_dim must be at most"):
        LightningSpec(heads=2**10, head_dim=2**16, block=256)
