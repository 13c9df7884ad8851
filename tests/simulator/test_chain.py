"""Irregular lists of layers: each layer built stands for the others of its kind."""

from __future__ import annotations

import json

import attrs
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16
from simulator import Training
from simulator.liger import Liger
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.reading import read_model, spec_from_config
from simulator.report import Report
from simulator.timeline import LiveSet, moments
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


def test_what_the_last_layer_hands_on_is_found_behind_other_ops(tmp_path):
    """Nemotron's last norm adds one to its weight before it reads hidden states."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nemotron", **sizes, **heads}))
    plan = make_plan(read_model(str(tmp_path)), Training(seq_len=64))
    report = Report(plan, lower(plan))
    assert sum(live.nbytes for live in report.live()) == report.peak.nbytes


def test_layers_of_one_kind_need_not_follow_one_another():
    """Autocast's copies of weights are freed behind the stack, those of layers that are not recomputed among them."""
    model = attrs.evolve(MODELS[1], layers=MODELS[1].layers[:1] * 9)
    plan = make_plan(model, Training(seq_len=64, autocast=BF16))
    program, live = lower(attrs.evolve(plan, recomputed=frozenset(range(0, 9, 2)))), LiveSet()
    for node in (program.load, program.cold, program.steady):
        for moment in moments(node):
            live.run(moment)


def test_what_the_first_layer_is_given_goes_once():
    """Nemotron's norms save copies of hidden states under autocast, whose copies of weights go behind the stack."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    model = spec_from_config({"model_type": "nemotron", **sizes, **heads}, "small")
    biased = attrs.evolve(model.layers[0], token_mixer=attrs.evolve(model.layers[0].token_mixer, bias=True))
    model = attrs.evolve(model, layers=(biased, biased, model.layers[0]))
    training = Training(seq_len=1, autocast=BF16, attention="eager")
    short, every = (report_of(model, training, (), unrolled=flag) for flag in (False, True))
    assert (short.cold.end_bytes, short.cold.by_role) == (every.cold.end_bytes, every.cold.by_role)


def test_the_last_layer_may_add_gradients_otherwise():
    """Liger's fused loss hands a view to the last layer, to which nothing is added in place as it is further up."""
    sizes = {"hidden_size": 4, "intermediate_size": 1, "num_hidden_layers": 1, "vocab_size": 1, "head_dim": 2}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "layer_types": ["full_attention"]}
    model = spec_from_config({"model_type": "exaone4", **sizes, **heads}, "small")
    layer = model.layers[0]
    wider = attrs.evolve(layer, channel_mixer=attrs.evolve(layer.channel_mixer, width=2))
    switches = Liger(rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
    training = Training(seq_len=1, attention="eager", liger=switches)
    model = attrs.evolve(model, layers=(layer, wider, layer))
    short, every = (report_of(model, training, (), unrolled=flag) for flag in (False, True))
    assert short.timeline().total.tolist() == every.timeline().total.tolist()
