"""Bytes to text and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.errors import UsageError
from hardware.units import GB, GIB, MIB, both, parse


@given(st.integers(1, 10**6), st.sampled_from([("GiB", GIB), ("GB", GB), ("MiB", MIB), ("B", 1)]))
def test_whole_quantities_are_exact(count, unit):
    text, factor = unit
    assert parse("headroom", f"{count}{text}") == parse("headroom", f" {count} {text.lower()} ") == count * factor


def test_binary_and_decimal_stand_side_by_side():
    assert both(80 * GB) == "74.51 GiB (80.00 GB)"


@given(st.text())
def test_any_text_is_bytes_or_a_usage_error(text):
    try:
        assert parse("headroom", text) > 0
    except UsageError as error:
        assert str(error).startswith("'headroom' must be a positive number of bytes")


@pytest.mark.parametrize("text", ["24", "0GiB", "-1GiB", "1e3GiB", "24 G", "1" * 13 + "B", ".5GiB"])
def test_a_number_without_a_plain_unit_is_refused(text):
    with pytest.raises(UsageError):
        parse("headroom", text)
