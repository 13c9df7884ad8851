"""Liger's kernels: the properties of every model hold with them, they save, and what they do not patch is refused."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.liger import FAMILIES, KERNELS, Liger, default_kernels, liger
from simulator.mesh import Mesh
from simulator.model import AttentionSpec
from simulator.roles import Role
from simulator.workload import Optimizer
from strategies.fsdp2 import Fsdp2
from tests.simulator import test_properties as properties
from tests.strategies import liger_runs, uniform_llama

TRAINING = Training(micro_batch=3, seq_len=40, weights=BF16, optimizer=Optimizer(name="sgd"))


def peak(model, training):
    return simulate(model, training).peak.nbytes


@properties.some
@given(liger_runs(), properties.choices)
def test_fold_is_unroll(run, strategies):
    properties.test_fold_is_unroll.hypothesis.inner_test(*run, strategies)


@properties.some
@given(liger_runs(), properties.choices)
def test_repeats_stand_for_every_layer(run, strategies):
    properties.test_repeats_stand_for_every_layer.hypothesis.inner_test(*run, strategies)


@properties.some
@given(liger_runs())
def test_naive_interpreter_agrees(run):
    properties.test_naive_interpreter_agrees.hypothesis.inner_test(*run)


@properties.some
@given(liger_runs(), properties.choices)
def test_a_steady_step_leaks_nothing(run, strategies):
    properties.test_a_steady_step_leaks_nothing.hypothesis.inner_test(*run, strategies)


@pytest.mark.parametrize("kernel", default_kernels("llama"))
def test_what_a_layer_keeps_never_grows(kernel):
    """Forward of two more layers keeps no more activations with a kernel than without it."""

    def kept(switches):
        few, many = (simulate(uniform_llama(n), attrs.evolve(TRAINING, liger=switches)) for n in (4, 6))
        return many.peak.by_role[Role.ACTIVATION] - few.peak.by_role[Role.ACTIVATION]

    assert kept(liger((kernel,))) <= kept(Liger())


def test_no_logits_are_kept():
    """With a long vocabulary the fused loss needs less than the kernel on logits, and that less than PyTorch's."""
    model = attrs.evolve(uniform_llama(2), vocab=4000)
    fused, kernel, plain = (
        peak(model, attrs.evolve(TRAINING, liger=liger(names)))
        for names in (("fused_linear_cross_entropy",), ("cross_entropy",), ())
    )
    assert fused < kernel < plain


def test_switches_are_validated():
    with pytest.raises(UsageError, match="no Liger kernel named 'rmsnorm'; did you mean 'rms_norm'"):
        liger(("rmsnorm",))
    with pytest.raises(UsageError, match="not both"):
        Liger(cross_entropy=True, fused_linear_cross_entropy=True)
    with pytest.raises(UsageError, match="'rope' must be True or False"):
        Liger(rope="yes")
    with pytest.raises(UsageError, match="'multiprocessors' must be a whole number"):
        Liger(multiprocessors=0)


def test_every_family_has_one_loss_by_default():
    for family in FAMILIES:
        chosen = default_kernels(family)
        assert set(chosen) <= set(KERNELS)
        assert len({"cross_entropy", "fused_linear_cross_entropy"} & set(chosen)) == 1


@pytest.mark.parametrize(
    ("family", "names", "message"),
    [
        ("gpt2", ("rope",), "'liger' is modelled for .*, not for gpt2: leave it out"),
        ("llama", ("geglu",), "geglu is not for llama: Liger does not patch it there; leave it out"),
        ("mistral", ("cross_entropy",), "transformers does not use since 4.46; leave it out"),
        ("granite", ("fused_linear_cross_entropy",), "Liger has none for logits that are scaled"),
    ],
)
def test_what_liger_does_not_patch_is_refused(family, names, message):
    model = attrs.evolve(uniform_llama(2), family=family)
    with pytest.raises(UnsupportedError, match=message):
        simulate(model, attrs.evolve(TRAINING, liger=liger(names)))


def test_a_part_of_each_head_is_refused():
    layer = attrs.evolve(uniform_llama(1).layers[0], token_mixer=AttentionSpec(4, 2, 8, rotary_dim=4))
    model = attrs.evolve(uniform_llama(1), family="phi3", layers=(layer,))
    with pytest.raises(UnsupportedError, match="turns whole heads, and this model a part of each: leave rope out"):
        simulate(model, attrs.evolve(TRAINING, liger=liger(("rope",))))


def test_another_activation_is_refused():
    layer = uniform_llama(1).layers[0]
    layer = attrs.evolve(layer, channel_mixer=attrs.evolve(layer.feed_forward, activation="relu"))
    model = attrs.evolve(uniform_llama(1), layers=(layer,))
    with pytest.raises(UnsupportedError, match="swiglu computes silu, not relu as this model: leave swiglu out"):
        simulate(model, attrs.evolve(TRAINING, liger=liger(("swiglu",))))


@pytest.mark.parametrize("field", [{"liger": liger(("rope",))}, {"items_in_batch": True}])
def test_frameworks_and_other_implementations_are_refused(field):
    with pytest.raises(UnsupportedError, match="goes with implementation transformers, not 'torchtitan'"):
        attrs.evolve(TRAINING, implementation="torchtitan", **field)
    with pytest.raises(UnsupportedError, match="not modelled together with fsdp2 yet"):
        simulate(uniform_llama(2), attrs.evolve(TRAINING, **field), [Fsdp2()], mesh=Mesh(dp_shard=2))
