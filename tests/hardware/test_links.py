"""The link table through its public surface."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from hardware.errors import UsageError
from hardware.links import link, link_names
from hardware.units import GB

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "interconnects.csv"


@pytest.mark.parametrize("name", link_names())
def test_every_link_has_a_speed_and_a_source(name):
    found = link(name.upper())
    assert found.name == name
    assert 0 < found.bytes_per_second_per_direction == found.bandwidth.low
    assert found.source
    assert found.confidence


@pytest.mark.parametrize("name", link_names())
def test_a_peer_gets_at_most_the_whole_link(name):
    found = link(name)
    assert (found.per_peer or 0) <= found.bandwidth.high


def test_an_unknown_link_gets_a_suggestion():
    with pytest.raises(UsageError, match=r"no link named 'nvlink9'; did you mean .*'nvlink"):
        link("nvlink9")


@pytest.mark.skipif(not REFERENCE.exists(), reason="the source tables are not beside the checkout")
def test_speeds_are_the_sources():
    ours = {link(name).product: link(name) for name in link_names()}
    with REFERENCE.open(encoding="utf-8", newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if not row["link"].startswith("NCCL")]
    for row in rows:
        expected = int(row["GBps_per_direction_per_gpu"]) * GB
        assert ours[row["link"]].bytes_per_second_per_direction == expected
