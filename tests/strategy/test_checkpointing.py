"""Which layers are recomputed, and what is one checkpoint: every n-th, the first few, chunks."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.roles import Phase
from strategies.attention_checkpointing import AttentionCheckpointing
from strategies.block_checkpointing import BlockCheckpointing
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.freezing import Freezing
from strategies.interval_checkpointing import IntervalCheckpointing
from strategies.module_checkpointing import ModuleCheckpointing
from strategies.op_checkpointing import OpCheckpointing
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


class TestReentrant(StrategyContract):
    strategy = FullCheckpointing(reentrant=True)


class TestReentrantInterval(StrategyContract):
    strategy = IntervalCheckpointing(n=3, reentrant=True)


class TestOffloaded(StrategyContract):
    strategy = FullCheckpointing(offload=True)


class TestModules(StrategyContract):
    strategy = ModuleCheckpointing(modules="mlp+input_layernorm")


class TestAttention(StrategyContract):
    strategy = AttentionCheckpointing()


class TestOps(StrategyContract):
    strategy = OpCheckpointing()


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


@settings(max_examples=20)
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


def test_a_reentrant_checkpoint_holds_the_gradient_it_came_with():
    reentrant, other = (sum(peak(6, FullCheckpointing(reentrant=flag)).values()) for flag in (True, False))
    assert reentrant > other


def test_reentrant_checkpoints_need_a_gradient_to_pass_on():
    strategies = [UniformCheckpointing(layers=2, reentrant=True), Freezing(embeddings=True)]
    with pytest.raises(UnsupportedError, match="a reentrant checkpoint needs an input that requires a gradient"):
        simulate(uniform_llama(4), TRAINING, strategies)


def test_reentrant_checkpoints_and_hooks():
    with pytest.raises(UnsupportedError, match="under a framework's hooks are not modelled"):
        simulate(uniform_llama(2), TRAINING, [FullCheckpointing(reentrant=True), Ddp()], mesh=Mesh(dp_replicate=2))


def test_offloaded_inputs_are_on_the_host():
    """Of 12 layers 12 inputs of bf16 ``[2, 64, 32]``, which the device does not keep after forward."""
    inputs = 12 * 2 * 64 * 32 * 2
    assert simulate(uniform_llama(12), TRAINING, [FullCheckpointing(offload=True)]).host_bytes == inputs
    assert simulate(uniform_llama(12), TRAINING, [FullCheckpointing()]).host_bytes == 0
    assert after_forward(FullCheckpointing()) - after_forward(FullCheckpointing(offload=True)) == inputs


def test_what_checkpoints_keep_lies_between_nothing_and_everything():
    """The more is kept from forward, the more backward begins with."""
    most = [FullCheckpointing(offload=True), FullCheckpointing(), OpCheckpointing()]
    most += [OpCheckpointing(every_second_mm=False), AttentionCheckpointing()]
    sizes = [after_forward(each) for each in most]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(sizes)


def test_unknown_modules():
    with pytest.raises(UsageError, match="'modules' must name modules of a layer: 'mpl'; there are act_fn, down_proj"):
        simulate(uniform_llama(2), TRAINING, [ModuleCheckpointing(modules="mpl")])


def test_offloading_is_transformers_own():
    with pytest.raises(UnsupportedError, match="'offload' of full_checkpointing goes with"):
        simulate(uniform_llama(2), TRAINING, [FullCheckpointing(offload=True, reentrant=True)])


def test_attention_modules_under_autocast():
    training = Training(micro_batch=2, seq_len=64, autocast=BF16)
    with pytest.raises(UnsupportedError, match="under autocast torch saves fewer tensors"):
        simulate(uniform_llama(2), training, [ModuleCheckpointing(modules="self_attn")])


def test_modules_under_hooks():
    with pytest.raises(UnsupportedError, match="checkpoints of modules under a framework's hooks are not modelled"):
        simulate(uniform_llama(2), TRAINING, [ModuleCheckpointing(), Ddp()], mesh=Mesh(dp_replicate=2))
