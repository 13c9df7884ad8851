"""Which layers are built of a list of layers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulator.layout import chain_of, layout_of


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 3))
def test_every_layer_is_built_or_stood_for_by_one_like_it(kinds, reach):
    layout = layout_of(kinds, reach)
    built = dict(layout.built(kinds))
    assert [built[slot] for slot in layout.slots()] == kinds
    assert sum(place.repeats for place in layout.places) == len(kinds)


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 3))
def test_a_pattern_is_built_a_few_times_however_often_it_repeats(count, period, reach):
    layout = layout_of(list(range(period)) * count, reach)
    assert len(layout.places) <= period * min(count, 2 * reach + 1)


def test_runs_between_exceptions_are_short():
    """Fifteen layers alike and one that is not, eight times: of a pattern of sixteen three turns would be built."""
    assert len(layout_of(([0] * 15 + [1]) * 8).places) <= 8 * 4
    assert len(layout_of([0] * 14 + [1, 2] + [0] * 14 + [1, 3] + [0] * 14).places) == 13


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 3))
def test_in_a_chain_every_layer_has_the_neighbours_it_has_in_the_model(kinds, reach):
    layout = chain_of(kinds, reach)
    padded, chain = ([None] * reach + row + [None] * reach for row in (kinds, [k for _, k in layout.built(kinds)]))
    for layer, slot in enumerate(layout.slots()):
        assert chain[slot : slot + 2 * reach + 1] == padded[layer : layer + 2 * reach + 1]
    assert [place.repeats for place in layout.places] == [layout.slots().count(i) for i in range(len(layout.places))]


def test_a_chain_is_short_where_turns_are_long():
    """Nemotron 3 Nano: of 52 layers in several patterns, fifteen have all there is."""
    kinds = "MEMEM*E" * 5 + "MEMEMEM*E" + "ME" * 4
    assert len(layout_of(kinds).places) == 36
    assert len(chain_of(kinds).places) == 15
