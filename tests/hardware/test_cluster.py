"""What may stand after --gpus."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hardware.cluster import MOST_GPUS, Cluster, parse_cluster
from hardware.errors import UsageError
from hardware.gpus import all_gpus, gpu
from hardware.units import GB, GIB

COUNTS = st.integers(1, MOST_GPUS)


@given(COUNTS, st.sampled_from(all_gpus()), st.sampled_from(["x", "X", " x "]))
def test_count_and_name_come_back(count, card, times):
    assert parse_cluster(f"{count}{times}{card.name}") == Cluster(card, count)


@given(COUNTS, st.sampled_from(all_gpus()))
def test_the_text_of_a_cluster_parses_to_it(count, card):
    cluster = Cluster(card, count)
    assert parse_cluster(str(cluster)) == cluster


def test_a_name_alone_is_one_device():
    assert parse_cluster("a100-80") == Cluster(gpu("a100-80"), 1)
    assert parse_cluster("64xh100") == Cluster(gpu("h100-80"), 64)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("24GiB", 24 * GIB), ("80GB", 80 * GB), ("8x23.5 gib", 23 * GIB + GIB // 2), ("1TiB", 1024 * GIB)],
)
def test_a_capacity_stands_for_a_card_no_table_knows(text, nbytes):
    card = parse_cluster(text).gpu
    assert (card.capacity.low, card.capacity.high, card.capacity.basis) == (nbytes, nbytes, "given")
    assert card.bandwidth is None
    assert parse_cluster(card.name).gpu == card


@given(st.text() | st.from_regex(r"\s*[-+0-9.]*\s*[xX]?\s*[0-9.]*[a-zA-Z0-9-]*", fullmatch=True))
@example("9" * 5000 + "xa100-80")
@example("9" * 5000 + "GiB")
@example("\N{SUPERSCRIPT TWO}xa100-80")
@example("\N{ARABIC-INDIC DIGIT THREE}xa100-80")
@example("1..5GiB")
def test_any_text_is_a_cluster_or_one_line_of_usage_error(text):
    try:
        assert parse_cluster(text).count >= 1
    except UsageError as error:
        assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "x",
        "8x",
        "0xa100-80",
        "-1xa100-80",
        "1.5xa100-80",
        "8",
        "8xx",
        f"{MOST_GPUS + 1}xt4",
        "0GiB",
        "1kB",
        "99TB",
    ],
)
def test_bad_text_is_refused_with_the_value(text):
    with pytest.raises(UsageError):
        parse_cluster(text)


def test_the_error_names_field_rule_value_and_way_out():
    with pytest.raises(UsageError) as caught:
        parse_cluster("1.5xh100")
    assert str(caught.value) == (
        "'gpus' must be NAME or COUNTxNAME with a whole COUNT, e.g. a100-80 or 8xh100-80: '1.5xh100'"
    )
