"""State space layers, alone or among others: properties of every model, what is read, what is refused."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tests.simulator import test_properties as properties
from tests.strategies import hybrid_specs, trainings

some = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
MIXER = {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 8, "num_hidden_layers": 2, "chunk_size": 8}


@some
@given(hybrid_specs(), trainings(), properties.choices)
def test_fold_is_unroll(model, training, strategies):
    properties.test_fold_is_unroll.hypothesis.inner_test(model, training, strategies)


@some
@given(hybrid_specs(max_layers=12), trainings(), properties.choices)
def test_repeats_stand_for_every_layer(model, training, strategies):
    properties.test_repeats_stand_for_every_layer.hypothesis.inner_test(model, training, strategies)


@some
@given(hybrid_specs(max_layers=4), trainings())
def test_naive_interpreter_agrees(model, training):
    properties.test_naive_interpreter_agrees.hypothesis.inner_test(model, training)
