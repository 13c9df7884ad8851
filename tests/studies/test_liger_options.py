"""The command line's options for Liger-Kernel and ``num_items_in_batch``: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator.reading import read_model, spec_from_class
from studies.estimate import estimate
from studies.options import TrainingOptions, resolve

LLAMA, GRANITE = read_model("llama-3.2-1b"), spec_from_class("GraniteConfig", {"num_hidden_layers": 2}, "granite")


def resolved(model=LLAMA, **options):
    return resolve(TrainingOptions(**options), model)


def test_liger_is_what_the_trainer_patches():
    found = resolved(liger=True)
    assert found.training.liger.kernels == ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy")
    assert "--liger-kernels rope,rms_norm,swiglu,fused_linear_cross_entropy" in found.assumptions
    assert any("--multiprocessors 132" in line for line in found.assumptions)
    assert "cross_entropy" in resolved(GRANITE, liger=True).training.liger.kernels


def test_some_kernels_and_no_others():
    found = resolved(liger_kernels="rms_norm,cross_entropy", multiprocessors=108)
    assert found.training.liger.kernels == ("rms_norm", "cross_entropy")
    assert found.training.liger.multiprocessors == 108
    assert not any("multiprocessors" in line for line in found.assumptions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"liger": True, "liger_kernels": "rope"}, "give one of the two"),
        ({"liger_kernels": ""}, "'liger_kernels' must name some of rope, rms_norm"),
        ({"liger_kernels": "rope,,swiglu"}, "'liger_kernels' must name some of rope, rms_norm"),
        ({"liger_kernels": "rope,rope"}, "'liger_kernels' must name each once: 'rope,rope'"),
        ({"liger_kernels": "layernorm"}, "no Liger kernel named 'layernorm'"),
        ({"liger_kernels": "rope", "multiprocessors": 108}, "matter to Liger's rms_norm alone"),
        ({"multiprocessors": 108}, "matter to Liger's rms_norm alone"),
        ({"liger_kernels": "rms_norm", "multiprocessors": 0}, "'multiprocessors' must be a whole number"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        resolved(**options)


def test_a_family_that_liger_does_not_patch():
    with pytest.raises(UnsupportedError, match=r"'liger' is modelled for exaone4, .*, not for gpt2: leave it out"):
        resolved(read_model("gpt2"), liger=True)


def test_json_names_the_kernels():
    options = TrainingOptions(liger=True, dtype="bf16", seq_len=64, items_in_batch=True, gradient_accumulation=2)
    data = estimate(LLAMA, "h100-80", options, "0").to_json_dict()["training"]
    assert data["liger"]["kernels"] == ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy")
    assert data["liger"]["multiprocessors"] == 132
    assert data["items_in_batch"] is True
