"""Which layers are recomputed, and what is one checkpoint: every n-th, the first few, chunks."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.roles import Phase
from strategies.block_checkpointing import BlockCheckpointing
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.interval_checkpointing import IntervalCheckpointing
from strategies.uniform_checkpointing import UniformCheckpointing
from tests.strategies import uniform_llama

TRAINING = Training(micro_batch=2, seq_len=64, weights=BF16)


class TestIntervalCheckpointing(StrategyContract):
    strategy = IntervalCheckpointing(n=2)


class TestBlockCheckpointing(StrategyContract):
    strategy = BlockCheckpointing(layers=1)


class TestUniformCheckpointing(StrategyContract):
    strategy: ClassVar[UniformCheckpointing] = UniformCheckpointing(layers=2)


class TestUnevenChunks(StrategyContract):
    strategy: ClassVar[UniformCheckpointing] = UniformCheckpointing(layers=4)


def peak(layers, *strategies):
    return simulate(uniform_llama(layers), TRAINING, strategies).steady.by_role


@pytest.mark.parametrize(
    "strategy", [IntervalCheckpointing(n=1), BlockCheckpointing(layers=6), UniformCheckpointing(layers=1)]
)
def test_checkpointing_every_layer_by_any_name_is_full(strategy):
    assert peak(6, strategy) == peak(6, FullCheckpointing())


def after_forward(strategy):
    """Bytes alive when backward begins."""
    found = simulate(uniform_llama(12), TRAINING, [strategy]).timeline()
    backward = found.phases.index(Phase.BACKWARD, found.marks["steady"])
    return int(found.total[backward])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_the_more_layers_are_checkpointed_the_less_backward_begins_with(one, other):
    few, many = sorted((one, other))
    assert after_forward(BlockCheckpointing(layers=many)) <= after_forward(BlockCheckpointing(layers=few))
    assert after_forward(IntervalCheckpointing(n=few)) <= after_forward(IntervalCheckpointing(n=many))
    assert after_forward(UniformCheckpointing(layers=many)) <= after_forward(UniformCheckpointing(layers=few))


def test_a_chunk_keeps_one_input():
    """Of 12 layers in chunks of 4, the 12 inputs of bf16 ``[2, 64, 32]`` become 3."""
    saved = after_forward(FullCheckpointing()) - after_forward(UniformCheckpointing(layers=4))
    assert saved == 9 * 2 * 64 * 32 * 2


def test_more_layers_than_there_are():
    with pytest.raises(UsageError, match="'layers' of checkpoint_block must be at most the model's 2 layers: 3"):
        simulate(uniform_llama(2), TRAINING, [BlockCheckpointing(layers=3)])


def test_two_at_once():
    with pytest.raises(UnsupportedError, match="checkpoint_every does not go with another checkpointing"):
        simulate(uniform_llama(2), TRAINING, [FullCheckpointing(), IntervalCheckpointing(n=2)])
