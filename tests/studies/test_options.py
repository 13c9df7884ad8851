"""What is typed, what is assumed for the rest, and that the two never mix."""

from __future__ import annotations

import pytest

from hardware.dtypes import BF16, FP16, FP32
from hardware.errors import UsageError
from simulator import Optimizer
from simulator.reading import read_model
from studies.options import TrainingOptions, parse_headroom, parse_optimizer, resolve

GPT2 = read_model("gpt2")


def assumed(**options):
    return resolve(TrainingOptions(**options), GPT2).assumptions


@pytest.mark.parametrize(
    ("dtype", "weights", "autocast"),
    [("fp32", FP32, None), ("bf16", BF16, None), ("amp-bf16", FP32, BF16), ("amp-fp16", FP32, FP16)],
)
def test_dtypes(dtype, weights, autocast):
    training = resolve(TrainingOptions(dtype=dtype), GPT2).training
    assert (training.weights, training.autocast) == (weights, autocast)


def test_a_global_batch_is_micro_batches():
    training = resolve(TrainingOptions(global_batch=12, micro_batch=4), GPT2).training
    assert (training.micro_batch, training.gradient_accumulation) == (4, 3)


def test_optimizer_options_reach_the_optimizer():
    assert parse_optimizer("adamw,implementation=fused") == Optimizer(name="adamw", implementation="fused")
    typed = parse_optimizer("sgd,momentum=0.9,nesterov=true,weight_decay=0.1")
    assert typed == Optimizer(name="sgd", momentum=0.9, nesterov=True, weight_decay=0.1)


@pytest.mark.parametrize(
    "text", ["sgd,momentum=0.9,momentum=0.8", "adamw,", "adamw,amsgrad=yes", "adamw,=1", "adamw;fused", ",", ""]
)
def test_a_wrong_optimizer_is_refused(text):
    with pytest.raises(UsageError):
        parse_optimizer(text)


def test_what_was_given_is_not_called_assumed():
    given = " ".join(assumed(optimizer="adamw,implementation=fused,weight_decay=0", dtype="bf16", clip=1.0))
    assert "implementation=" not in given
    assert "weight_decay" not in given
    assert "amsgrad=false" in given
    assert "--dtype" not in given
    assert "clip" not in given
    assert "momentum=0.0" in " ".join(assumed(optimizer="sgd"))


@pytest.mark.parametrize(("text", "version"), [("2.6", (2, 6)), ("2.6.0+cu124", (2, 6)), ("2.13", (2, 13))])
def test_torch_versions_as_torch_prints_them(text, version):
    assert resolve(TrainingOptions(torch=text), GPT2).training.torch == version


@pytest.mark.parametrize("text", ["2", "3.0", "1.13", "2.²", "2." + "9" * 5000, "latest", "", "2.-1"])
def test_a_torch_version_that_does_not_exist(text):
    with pytest.raises(UsageError, match="torch"):
        resolve(TrainingOptions(torch=text), GPT2)


def test_headroom():
    assert parse_headroom("0", 1000) == parse_headroom("0%", 1000) == 0
    assert parse_headroom("12.5%", 1000) == 125
    assert parse_headroom("1KiB", 1000) == 1024


@pytest.mark.parametrize("text", ["5", "-1GiB", "100%", "nan%", "-1%", "%", "", "1e3GiB", "five"])
def test_a_wrong_headroom_shows_both_ways_to_say_it(text):
    with pytest.raises(UsageError, match=r"min-headroom.*%.*GiB"):
        parse_headroom(text, 1000)
