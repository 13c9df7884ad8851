"""The scaler of fp16 gradients: what it keeps, when it is assumed, and what it is refused with.

Its allocations, one by one, are among those of `test_optimizer_steps`.
"""

from __future__ import annotations

import attrs
import pytest
from hypothesis import assume, given, settings

from hardware.dtypes import BF16, FP16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Optimizer, Training, simulate
from simulator.reading import read_model, spec_from_class
from simulator.sizes import ALLOCATION_GRANULARITY
from strategies.checkpointing import FullCheckpointing
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from studies.options import TrainingOptions, resolve
from tests.strategies import model_specs, trainings

SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 40, "vocab_size": 50}
MODEL = spec_from_class("LlamaConfig", SMALL, "model")


def mixed(**changes):
    return Training(seq_len=8, weights=FP32, autocast=FP16, **changes)


@settings(max_examples=25)
@given(model_specs(max_layers=4), trainings())
def test_it_keeps_two_scalars_and_no_more_than_a_few_others_at_a_time(model, training):
    training = attrs.evolve(training, weights=FP32, autocast=FP16)
    assume(training.optimizer.name != "muon")
    try:
        without, scaled = (simulate(model, attrs.evolve(training, grad_scaler=flag), []) for flag in (False, True))
    except UnsupportedError:
        return
    assert scaled.steady.start_bytes - without.steady.start_bytes == 2 * ALLOCATION_GRANULARITY
    assert scaled.steady.end_bytes == scaled.steady.start_bytes
    for one, other in ((scaled.cold, without.cold), (scaled.steady, without.steady)):
        assert 0 <= one.nbytes - other.nbytes <= 6 * ALLOCATION_GRANULARITY


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"weights": BF16}, "is for fp16"),
        ({"weights": FP32, "autocast": BF16}, "is for fp16"),
        ({"weights": FP16}, "fused"),
        ({"weights": FP16, "optimizer": Optimizer(implementation="fused"), "clip": 1.0}, "clip"),
        ({"weights": FP32, "autocast": FP16, "optimizer_in_backward": True}, "after backward"),
    ],
    ids=str,
)
def test_it_refuses_what_torch_refuses(options, hint):
    with pytest.raises(UsageError, match=hint):
        Training(grad_scaler=True, **options)


@pytest.mark.parametrize("options", [{"optimizer": Optimizer(name="muon")}, {"implementation": "megatron"}], ids=str)
def test_it_refuses_what_is_not_modelled(options):
    with pytest.raises(UnsupportedError, match="grad_scaler"):
        mixed(grad_scaler=True, **options)


def test_strategies_that_own_gradients_are_refused():
    simulate(MODEL, mixed(grad_scaler=True), [FullCheckpointing(), Ddp()])
    with pytest.raises(UnsupportedError, match="grad_scaler"):
        simulate(MODEL, mixed(grad_scaler=True), [Fsdp2()])


@pytest.mark.parametrize(
    ("options", "expected", "line"),
    [
        ({"dtype": "amp-fp16"}, True, "--grad-scaler (torch"),
        ({"dtype": "amp-fp16", "grad_scaler": False}, False, None),
        ({"dtype": "amp-fp16", "strategy": ("ddp",)}, True, "--grad-scaler (torch"),
        ({"dtype": "amp-fp16", "strategy": ("fsdp2",)}, False, "with fsdp2"),
        ({"dtype": "amp-fp16", "optimizer": "muon"}, False, "with muon"),
        ({"dtype": "amp-fp16", "optimizer_in_backward": True}, False, "with --optimizer-in-backward"),
        ({"dtype": "amp-bf16"}, False, None),
        ({"dtype": "fp16"}, False, None),
    ],
    ids=str,
)
def test_assumed_as_transformers_trainer_does(options, expected, line):
    world = 2 if "strategy" in options else 1
    resolved = resolve(TrainingOptions(**options), read_model("gpt2"), world)
    said = [text for text in resolved.assumptions if "grad-scaler" in text]
    assert resolved.training.grad_scaler is expected
    assert len(said) == (line is not None)
    assert line is None or line in said[0]
