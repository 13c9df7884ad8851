"""Which layers are built of a list of layers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulator.layout import Sharing, layout_by_kind, layout_of


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


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=60),
    st.sampled_from([Sharing.LATER, Sharing.REST, Sharing.ALL]),
)
def test_a_layer_stands_for_others_of_its_kind(kinds, sharing):
    layout = layout_by_kind(kinds, sharing)
    built = [kind for _, kind in layout.built(kinds)]
    assert [built[slot] for slot in layout.slots()] == kinds
    assert layout.slots()[0] == 0
    several = len(set(kinds))
    assert len(built) <= several + {Sharing.LATER: several, Sharing.REST: 1, Sharing.ALL: several == 1}[sharing]


def test_an_order_without_a_period_is_cheaper_by_kind():
    """As in Nemotron 3: attention after two or three pairs of other layers."""
    kinds = [kind for pairs in (2, 3, 2, 3, 3, 2, 2, 3, 2, 3, 3) for kind in [*[0, 1] * pairs, 0, 2, 1]]
    assert (len(layout_by_kind(kinds).places), len(layout_of(kinds).places)) == (3, 77)
