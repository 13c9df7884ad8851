"""What must hold for every family that is simulated, whatever its config says."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16
from simulator import Training, simulate
from simulator.families import families
from simulator.plan import make_plan
from simulator.reading import spec_from_config
from simulator.sizes import product
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
