"""Options that would change nothing, or that no code takes, are refused in one line instead of being passed over."""

from __future__ import annotations

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator.reading import read_model
from studies.estimate import estimate
from studies.options import TrainingOptions


def refused(model, **options):
    with pytest.raises(UsageError) as error:
        estimate(read_model(model), "h100-80", TrainingOptions(**options))
    return error


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_falcon_has_attention_of_two_kinds(attention):
    error = refused("falcon-7b", dtype="bf16", attention=attention)
    assert error.type is UnsupportedError
    assert attention in str(error.value)


@pytest.mark.parametrize("options", [{"experts": "batched_mm"}, {"experts": "eager", "expert_imbalance": 2.0}])
def test_a_dense_model_has_no_experts_to_run(options):
    assert "no experts" in str(refused("gpt2", **options).value)


@pytest.mark.parametrize("options", [{"freeze": "layers=0"}, {"strategy": ("freeze",)}])
def test_freezing_nothing_is_no_freezing(options):
    assert "freezes nothing" in str(refused("gpt2", **options).value)
