"""What every recorded case has to show."""

from __future__ import annotations


def assert_exact(rows, *, phases_from: int = 0) -> None:
    """Every peak of `rows` to the byte, in the recorded phase.

    A recording names the phase of the peak before tensors are rounded to 512 B, which decides between the phases of
    tiny models: phases are compared where the peak is above `phases_from` bytes, and that in most rows.
    """
    assert [row.name for row in rows if row.error_pct != 0] == []
    large = [row for row in rows if row.expected_bytes > phases_from]
    assert len(large) > len(rows) / 2
    assert [row.name for row in large if row.phase_expected != row.phase_simulated] == []
