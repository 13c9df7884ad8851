"""Pipeline schedules: every order is valid, and what is in flight is what the papers say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.errors import UsageError
from simulator.schedules import SCHEDULES, schedule
from simulator.schedules.in_flight import in_flight, most_held
from simulator.schedules.replay import orders, replay
from simulator.schedules.tree import Kind, count, flat, text
from tests.strategies import schedules

some = settings(max_examples=60, deadline=None)


def held_at_most(order, whole, awaiting):
    """The peak by keeping a set of what is there, action by action."""
    open_, pending, highest = set(), set(), 0
    for kind, chunk, micro_batch, _ in order.tolist():
        here = chunk, micro_batch
        if kind == Kind.F:
            open_.add(here)
        elif kind == Kind.W:
            pending.remove(here)
        else:
            open_.remove(here)
            if kind == Kind.I:
                pending.add(here)
        highest = max(highest, sum(whole[c] for c, _ in open_) + sum(awaiting[c] for c, _ in pending))
    assert not open_
    assert not pending
    return highest


def published(s, rank):
    """Chunks x micro-batches whose activations are all held, by the formula of the schedule's source."""
    pp, m, below = s.pp, s.micro_batches, s.pp - 1 - rank
    warm_up = {
        "gpipe": m - 1,
        "1f1b": below,
        # Megatron-LM, get_pp_rank_microbatches
        "interleaved_1f1b": 2 * below + (s.chunks - 1) * s.group,
        # arXiv:2401.10241, section 2: (p - i + 1) M_B with i from 1 on
        "zb_h1": below + (s.chunks - 1) * s.group,
    }
    if s.name in warm_up:
        return min(warm_up[s.name] + 1, m * s.chunks)
    if s.name == "zbv":  # p M_B (section 6), that is 2 p halves; what a pipeline that is not filled lacks is missing
        return min(m, 2 * pp - 1 - rank) + min(m, rank + 1)
    # deepseek-ai/DualPipe's table: PP + 1, where PP counts stages
    return s.stages + 1


def check(s):
    found = replay(s)
    assert len(found.order) == sum(count(s.tree(rank)) for rank in range(s.pp))
    for rank in range(s.pp):
        assert in_flight(s, rank).whole == published(s, rank)


@some
@given(schedules())
def test_every_order_is_valid_and_holds_what_is_published(s):
    check(s)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_small_size(name):
    legal = 0
    for pp in range(1, 7):
        for micro_batches in range(1, 15):
            for chunks in range(1, 4):
                try:
                    s = schedule(name, pp, micro_batches, chunks)
                except UsageError:
                    continue
                check(s)
                legal += 1
    assert legal > 10


@some
@given(schedules(), st.data())
def test_folding_the_tree_equals_replaying_its_order(s, data):
    rank = data.draw(st.integers(0, s.pp - 1))
    sizes = st.lists(st.integers(0, 100), min_size=s.chunks, max_size=s.chunks)
    whole, awaiting = data.draw(sizes), data.draw(sizes)
    tree = s.tree(rank)
    assert most_held(tree, whole, awaiting) == held_at_most(flat(tree), whole, awaiting)
    found, none = in_flight(s, rank), [0] * s.chunks
    for chunk, most in enumerate(found.by_chunk):
        assert most == held_at_most(flat(tree), [int(c == chunk) for c in range(s.chunks)], none)


@some
@given(schedules(("zb_h1",)), st.integers(0, 1000), st.integers(0, 1000))
def test_zb_h1_holds_what_its_paper_says(s, smaller, more):
    """(p - i + 1) M_B + (i - 1) M_W on worker i, from 1 on, for one chunk (arXiv:2401.10241, section 2)."""
    if s.chunks > 1 or s.micro_batches < s.pp:
        return
    for rank in range(s.pp):
        held = most_held(s.tree(rank), [smaller + more], [smaller])
        assert held == (s.pp - rank) * (smaller + more) + rank * smaller


@some
@given(schedules(("zbv", "dualpipe", "dualpipev")))
def test_ranks_of_bidirectional_schedules_hold_the_same(s):
    """The point of the V: no rank holds more than another once the pipeline is filled."""
    if s.micro_batches >= 2 * s.pp - 1:
        assert len({in_flight(s, rank).at_once for rank in range(s.pp)}) == 1
        assert in_flight(s, 0).at_once == in_flight(s, 0).whole


@some
@given(schedules(("dualpipe",)))
def test_dualpipe_is_its_own_mirror_image(s):
    found = orders(s)
    for order, mirrored in zip(found, reversed(found), strict=True):
        half = s.micro_batches // 2
        swapped = order.copy()
        swapped[:, 1] = 1 - order[:, 1]
        swapped[:, 2] = (order[:, 2] + half) % s.micro_batches
        assert (swapped == mirrored).all()


@pytest.mark.parametrize(
    ("name", "bubble"),
    # In units of F = I = W: (p - 1) (F + B) of GPipe and 1F1B, divided by v when interleaved (arXiv:2104.04473,
    # section 2.2), (p - 1) (F + I - W) of ZB-H1, none of ZBV's but for the ramp of the first forwards.
    [("gpipe", 7 * 3), ("1f1b", 7 * 3), ("interleaved_1f1b", 7 * 3), ("zb_h1", 7), ("zbv", 7)],
)
def test_bubbles_are_those_of_the_papers(name, bubble):
    s = schedule(name, 8, 32)
    assert replay(s).end.max() == 3 * 32 * s.chunks + bubble


def broken(s, change):
    found = orders(s)
    change(found)
    with pytest.raises(UsageError) as caught:
        replay(s, found)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checker_finds_what_is_wrong():
    s = schedule("1f1b", 4, 8)

    def miss(found):
        found[1] = np.delete(found[1], 4, axis=0)

    def double(found):
        found[2] = np.concatenate([found[2], found[2][:1]])

    def swap(found):
        found[0][[0, -1]] = found[0][[-1, 0]]

    def late(found):
        found[1] = found[1][::-1]

    def unknown(found):
        found[3][0, 1] = 1

    def alone(found):
        found[3][-1, 3] = 1

    assert broken(s, miss).startswith("micro-batch 3 on stage 1 needs one F, and one B or else one I and one W")
    assert "F 2" in broken(s, double)
    assert broken(s, swap).endswith("rank 0, before B of micro-batch 7 on stage 0, for B of micro-batch 7 on stage 1")
    assert "ranks of 1f1b wait for each other" in broken(s, late)
    assert "chunk 1" in broken(s, unknown)
    assert "no next one" in broken(s, alone)


def test_a_checker_finds_a_backward_away_from_its_forward():
    """DualPipe's stage 0 is on both ranks of two; a micro-batch's activations are on one."""

    def moved(found):
        last = np.flatnonzero((found[0][:, 1] == 0) & (found[0][:, 0] == Kind.B))[-1]
        row = found[0][last].copy()
        found[0] = np.delete(found[0], last, axis=0)
        row[1] = 1
        found[1] = np.concatenate([found[1], [row]])

    assert "on another rank than its forward" in broken(schedule("dualpipe", 2, 4), moved)


def test_a_checker_finds_a_pair_that_waits_for_itself():
    def paired(found):
        found[0][0, 3] = 1

    message = broken(schedule("1f1b", 1, 2), paired)
    assert message.endswith("before F of micro-batch 0 on stage 0, for F of micro-batch 0 on stage 0")
    assert "2 ranks and needs an order for each: 1" in broken(schedule("1f1b", 2, 2), lambda found: found.pop())


@some
@given(schedules(tuple(name for name in SCHEDULES if not name.startswith("dualpipe"))), st.data())
def test_a_micro_batch_cannot_go_backward_before_it_goes_forward(s, data):
    """Two actions of one micro-batch on one chunk, exchanged, are refused wherever they are."""
    found = orders(s)
    rank = data.draw(st.integers(0, s.pp - 1))
    one = data.draw(st.integers(0, len(found[rank]) - 1))
    same = np.flatnonzero((found[rank][:, 1:3] == found[rank][one, 1:3]).all(axis=1))
    other = data.draw(st.sampled_from([int(index) for index in same if index != one]))
    found[rank][[one, other]] = found[rank][[other, one]]
    with pytest.raises(UsageError, match="wait for each other"):
        replay(s, found)


@pytest.mark.parametrize(
    ("name", "numbers", "message"),
    [
        ("1f1b", (0, 8), "'pp' must be an integer from 1 to 512: 0"),
        ("1f1b", (4, -1), "'micro_batches' must be an integer"),
        ("1f1b", (4, 8, 2), "'chunks' of 1f1b must be 1: 2; leave it out, or take interleaved_1f1b or zb_h1"),
        ("1f1b", (4, 8, 1, 4), "1f1b has no 'group': 4; leave it out, or take interleaved_1f1b or zb_h1"),
        (
            "interleaved_1f1b",
            (4, 8, 1),
            "'chunks' of interleaved_1f1b must be at least 2: 1; leave it out, or take 1f1b",
        ),
        (
            "interleaved_1f1b",
            (4, 10),
            "whole groups of 4 (or leave 4 or more for the last): 10; take 8 or 12, or 'group' 5",
        ),
        ("interleaved_1f1b", (4, 3), "take 4, or 'group' 3"),
        ("zb_h1", (4, 9, 2), "'micro_batches' of zb_h1 must be whole groups of 4"),
        ("zbv", (4, 9, 3), "'chunks' of zbv must be 2: 3; leave it out"),
        ("dualpipe", (5, 20), "'pp' of dualpipe must be even: 5; take 6, or dualpipev or zbv"),
        ("dualpipe", (4, 9), "must be even and at least 2 x pp = 8: 9; take 10, or 1f1b"),
        ("dualpipev", (4, 7), "'micro_batches' of dualpipev must be at least 2 x pp = 8: 7; take 8, or zbv"),
        ("1f2b", (4, 7), "no schedule named '1f2b'; did you mean"),
    ],
)
def test_what_a_schedule_is_not_defined_for_is_one_line(name, numbers, message):
    with pytest.raises(UsageError) as caught:
        schedule(name, *numbers)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@some
@given(
    st.integers(1, 16), st.integers(1, 64), st.sampled_from(("interleaved_1f1b", "zb_h1")), st.integers(2, 4),
    st.none() | st.integers(1, 70),
)  # fmt: skip
def test_the_way_out_of_a_wrong_number_is_one(pp, micro_batches, name, chunks, group):
    try:
        schedule(name, pp, micro_batches, chunks, group)
    except UsageError as error:
        counts, _, other_group = str(error).split("; take ")[1].partition(", or 'group' ")
        assert counts.endswith(" without 'group'") == (group not in (None, pp))
        for other in counts.removesuffix(" without 'group'").split(" or "):
            schedule(name, pp, int(other), chunks)
        if other_group:
            schedule(name, pp, micro_batches, chunks, int(other_group))


@some
@given(schedules())
def test_trees_stay_small(s):
    """A tree does not grow with the micro-batches, beyond what fills and drains the pipeline."""
    words = text(s.tree(0)).split()
    assert len(words) <= 60 * s.chunks + 12 * s.pp


def test_a_tree_reads_as_text():
    assert text(schedule("1f1b", 4, 8).tree(1)) == "2*(0F0+1) 6*(0F2+1 0B0+1) 2*(0B6+1)"
    many = schedule("interleaved_1f1b", 2, 512)
    assert (
        text(many.tree(1)) == "2*(0F0+1) 255*(2*(1F0+2+1 1B0+2+1) 2*(0F2+2+1 0B0+2+1)) 2*(1F510+1 1B510+1) 2*(0B510+1)"
    )
