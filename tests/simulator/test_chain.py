"""Irregular lists of layers: each layer built stands for the others of its kind."""

from __future__ import annotations

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16
from simulator import Training
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.reading import read_model
from simulator.report import Report
from strategies.checkpointing import FullCheckpointing

MODELS = [read_model(name) for name in ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "google/gemma-3-1b-it")]


@st.composite
def irregular_models(draw):
    """A model of a few kinds of layers in no order."""
    model = draw(st.sampled_from(MODELS))
    kinds = list(dict.fromkeys(model.layers))
    return attrs.evolve(model, layers=tuple(draw(st.lists(st.sampled_from(kinds), min_size=6, max_size=16))))


def report_of(model, training, strategies, *, unrolled):
    plan = apply(make_plan(model, training, unrolled=unrolled), strategies)
    return Report(plan, lower(plan))


@settings(max_examples=15)
@given(irregular_models(), st.sampled_from([(), (FullCheckpointing(),)]), st.integers(1, 2), st.booleans())
def test_what_is_built_has_the_timeline_of_the_model(model, strategies, micro_batches, eager):
    """Step by step, and at the peak storage by storage, as if every layer were built."""
    attention = "eager" if eager else "sdpa"
    training = Training(weights=BF16, seq_len=64, gradient_accumulation=micro_batches, attention=attention)
    short, every = (report_of(model, training, strategies, unrolled=flag) for flag in (False, True))
    assert short.timeline().total.tolist() == every.timeline().total.tolist()
    assert (short.peak.nbytes, short.peak.by_role) == (every.peak.nbytes, every.peak.by_role)
    assert short.timeline().total.max() == short.peak.nbytes == sum(live.nbytes for live in short.live())
    assert short.parameters == every.parameters


def test_a_shipped_hybrid_is_built_by_kind():
    assert len(make_plan(MODELS[0], Training()).layout.places) == len(set(MODELS[0].layers))
