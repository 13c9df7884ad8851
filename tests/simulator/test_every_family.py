"""What must hold for every family that is simulated, whatever its config says."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16
from simulator import Training, simulate
from simulator.families import families
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.reading import spec_from_config
from simulator.report import Report
from simulator.sizes import product
from strategies.checkpointing import FullCheckpointing
from tests.sketches import SKETCHES
from tests.strategies import family_configs

SIMULATED = [name for name in families.names() if not families.get(name).counted]
#: Wrappers around the family of the same name with ``_text``, which is drawn instead.
WRAPPERS = ("gemma3", "llama4", "qwen3_5", "qwen3_5_moe")
STEP = Training(seq_len=16, micro_batch=2, weights=BF16, attention="eager")


def test_every_simulated_family_is_drawn():
    assert sorted(set(SIMULATED) - set(WRAPPERS)) == sorted(SKETCHES)


@pytest.mark.parametrize("family", sorted(SKETCHES))
@settings(max_examples=8)
@given(data=st.data())
def test_parameters_are_those_of_the_whole_graph(family, data):
    """What a few built layers are counted for is what all layers hold."""
    model = spec_from_config(data.draw(family_configs(family)), "drawn")
    report = simulate(model, STEP)
    graph = make_plan(model, STEP, unrolled=True).graph
    sizes = make_plan(model, STEP, unrolled=True).dimensions.bindings
    assert report.parameters == sum(product(parameter.dims, sizes) for parameter in graph.parameters)


@pytest.mark.parametrize("family", sorted(SKETCHES))
@settings(max_examples=6)
@given(data=st.data())
def test_the_layers_that_are_built_stand_for_all(family, data):
    """Layers drawn of all kinds that the family has, in any order; what is freed, too, is freed once."""
    model = spec_from_config(data.draw(family_configs(family)), "drawn")
    kinds = list(dict.fromkeys(model.layers))
    more = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))
    layers = data.draw(st.permutations([*kinds, *more]))
    training = Training(seq_len=16, weights=BF16, attention="eager", gradient_accumulation=data.draw(st.integers(1, 2)))
    checkpointed = data.draw(st.sampled_from([(), (FullCheckpointing(),)]))
    plans = [make_plan(attrs.evolve(model, layers=tuple(layers)), training, unrolled=flag) for flag in (False, True)]
    short, every = (Report(plan, lower(plan)) for plan in (apply(plan, checkpointed) for plan in plans))
    assert (short.cold.by_role, short.steady.by_role) == (every.cold.by_role, every.steady.by_role)
    assert short.steady.end_bytes == every.steady.end_bytes
    assert sum(live.nbytes for live in short.live()) == short.peak.nbytes


@pytest.mark.parametrize("family", sorted(SKETCHES))
@settings(max_examples=5)
@given(data=st.data())
def test_nothing_shrinks_when_a_size_grows(family, data):
    config = data.draw(family_configs(family))
    key = data.draw(st.sampled_from(sorted(SKETCHES[family].sizes)))
    reports = [
        simulate(spec_from_config(each, "drawn"), STEP)
        for each in (config, {**config, key: config[key] + SKETCHES[family].sizes[key]})
    ]
    assert reports[0].parameters <= reports[1].parameters
    assert reports[0].peak.nbytes <= reports[1].peak.nbytes


@pytest.mark.parametrize("family", sorted(SKETCHES))
def test_the_smallest_model_and_the_longest_sequence(family):
    """One layer, few heads, a vocabulary of one; one token, and a million or as many as there are positions."""
    sketch = SKETCHES[family]
    longest = 1024 if families.get(family).bounded_positions else 10**6
    smallest = {**sketch.fixed, **sketch.sizes, **sketch.choices[0]}
    config = {"model_type": family, "max_position_embeddings": longest, **smallest}
    model = spec_from_config(config, "smallest")
    peaks = [simulate(model, Training(seq_len=length, attention="eager")).peak.nbytes for length in (1, longest)]
    assert peaks[0] < 10**8
    assert peaks[1] > longest**2
