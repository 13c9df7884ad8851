"""The load-balancing loss: a loop over layers outside of them repeats like the layers; what does not go with it."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError
from simulator import Training, simulate
from simulator.liger import Liger
from simulator.mesh import Mesh
from simulator.plan import apply, make_plan
from simulator.reading import spec_from_class
from strategies.checkpointing import FullCheckpointing
from strategies.deepspeed.zero3 import DeepSpeedZero3
from strategies.gemini import Gemini
from tests.simulator import test_properties as properties
from tests.strategies import balanced_models, trainings

some = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "vocab_size": 50, "num_hidden_layers": 5}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
MODEL = spec_from_class("MixtralConfig", {**SMALL, "output_router_logits": True}, "m")
STEP = Training(seq_len=8, weights=BF16)


@some
@given(balanced_models(), trainings(), properties.choices)
def test_fold_is_unroll(model, training, strategies):
    properties.test_fold_is_unroll.hypothesis.inner_test(model, training, strategies)


@some
@given(balanced_models(max_layers=12), trainings(), properties.choices)
def test_repeats_stand_for_every_layer(model, training, strategies):
    properties.test_repeats_stand_for_every_layer.hypothesis.inner_test(model, training, strategies)


@some
@given(balanced_models(max_layers=4), trainings())
def test_naive_interpreter_agrees(model, training):
    properties.test_naive_interpreter_agrees.hypothesis.inner_test(model, training)


@some
@given(balanced_models(), trainings(), properties.choices)
def test_a_steady_step_leaks_nothing(model, training, strategies):
    properties.test_a_steady_step_leaks_nothing.hypothesis.inner_test(model, training, strategies)


def test_depth_costs_nothing():
    deep = spec_from_class("MixtralConfig", {**SMALL, "output_router_logits": True, "num_hidden_layers": 200}, "m")
    assert len(make_plan(MODEL, STEP).graph.ops) == len(make_plan(deep, STEP).graph.ops)


def test_false_adds_nothing():
    without = spec_from_class("MixtralConfig", {**SMALL, "output_router_logits": False}, "m")
    assert without == spec_from_class("MixtralConfig", SMALL, "m")
    assert simulate(without, STEP).steady.nbytes < simulate(MODEL, STEP).steady.nbytes


@pytest.mark.parametrize("strategy", [DeepSpeedZero3(), Gemini(), FullCheckpointing(reentrant=True)])
def test_strategies_that_were_not_compared(strategy):
    with pytest.raises(UnsupportedError, match="with output_router_logits is not modelled"):
        apply(make_plan(MODEL, STEP, mesh=Mesh(dp_shard=2)), [strategy])


def test_the_fused_loss_is_refused():
    with pytest.raises(UnsupportedError, match="fused_linear_cross_entropy with output_router_logits"):
        simulate(MODEL, Training(seq_len=8, weights=BF16, liger=Liger(fused_linear_cross_entropy=True)))
