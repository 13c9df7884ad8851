"""Time of a pipeline schedule: a tree per rank, its order where one is needed, and the replay of all orders.

Run with ``python -m pytest benchmarks --benchmark-enable``.
"""

from __future__ import annotations

import pytest

from simulator.schedules import SCHEDULES, schedule
from simulator.schedules.replay import orders, replay


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_tree(benchmark, name):
    """Goal: 16 ranks and 512 micro-batches in well under a millisecond for each rank."""
    chosen = schedule(name, 16, 512)
    assert benchmark(chosen.tree, 7).parts


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_orders(benchmark, name):
    """Goal: at most 5 ms for 10,000 actions; 16 ranks and 512 micro-batches have 16,384 and more."""
    chosen = schedule(name, 16, 512)
    assert len(benchmark(orders, chosen)) == 16


@pytest.mark.parametrize("name", SCHEDULES)
def test_replay(benchmark, name):
    """Goal: at most 5 ms for 10,000 actions."""
    chosen = schedule(name, 16, 512)
    assert benchmark(replay, chosen, orders(chosen)).busy > 0
