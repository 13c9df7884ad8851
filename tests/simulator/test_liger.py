"""Liger's kernels: the properties of every model hold with them, they save, and what they do not patch is refused."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest
from hypothesis import given

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.liger import FAMILIES, KERNELS, Liger, default_kernels, liger
from simulator.mesh import Mesh
from simulator.model import AttentionSpec
from simulator.reading import read_model
from simulator.roles import Role
from simulator.workload import Optimizer
from strategies.bitfit import BitFit
from strategies.deepspeed.zero12 import DeepSpeedZero2
from strategies.float8 import Float8
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
def test_other_implementations_are_refused(field):
    with pytest.raises(UnsupportedError, match="goes with implementation transformers, not 'torchtitan'"):
        attrs.evolve(TRAINING, implementation="torchtitan", **field)


@pytest.mark.parametrize(
    ("field", "strategy"),
    [({"liger": liger(("rope",))}, DeepSpeedZero2()), ({"items_in_batch": True}, Fsdp2())],
)
def test_a_framework_that_was_not_compared_is_refused(field, strategy):
    with pytest.raises(UnsupportedError, match=f"not modelled together with {strategy.name} yet: leave one out"):
        simulate(uniform_llama(2), attrs.evolve(TRAINING, **field), [strategy], mesh=Mesh(dp_shard=2))


@pytest.mark.parametrize(("strategy", "name"), [(BitFit(), "frozen weights"), (Float8(), "float8")])
def test_other_changes_of_the_model_are_refused(strategy, name):
    layer = attrs.evolve(uniform_llama(1).layers[0], token_mixer=AttentionSpec(4, 2, 8, bias=True))
    model = attrs.evolve(uniform_llama(1), layers=(layer,))
    with pytest.raises(UnsupportedError, match=f"'liger' is not modelled together with {name} yet: leave one out"):
        simulate(model, attrs.evolve(TRAINING, micro_batch=2, liger=liger(("swiglu",))), [strategy])


def test_a_loss_that_does_not_take_the_items_is_refused():
    model = read_model("gemma-3-4b-it")
    with pytest.raises(UnsupportedError, match="not taken by Gemma 3 with its vision tower: leave it out"):
        simulate(model, attrs.evolve(TRAINING, items_in_batch=True))


DOCUMENT = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")


def test_the_document_lists_every_family():
    documented = {}
    row = re.compile(r"^\| (`\w+`(?:, `\w+`)*) \| ((?:\*?`\w+`\*?(?:, )?)+) \|$", re.MULTILINE)
    for families, kernels in row.findall(DOCUMENT):
        defaults = tuple(name for off, name in re.findall(r"(\*?)`(\w+)`", kernels) if not off)
        for family in re.findall(r"\w+", families):
            documented[family] = (set(re.findall(r"\w+", kernels)), set(defaults))
    assert documented == {family: (set(known), set(default_kernels(family))) for family, known in FAMILIES.items()}


def test_the_document_says_what_each_saves():
    rows = dict(re.findall(r"^\| (.*?) \|.*\| ([0-9]+\.[0-9]{2}) \|$", DOCUMENT, re.MULTILINE))
    model = read_model("llama-3.1-8b")
    training = Training(seq_len=8192, weights=BF16, optimizer=Optimizer(name="adamw_8bit"))
    for name, said in rows.items():
        kernels = {"none": (), "`--liger`": default_kernels("llama")}.get(name, (name.split(",")[0].strip("`"),))
        found = simulate(model, attrs.evolve(training, liger=liger(kernels))).steady.nbytes / 2**30
        assert f"{found:.2f}" == said, name
    assert len(rows) == 7
