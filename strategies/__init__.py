"""Techniques that change what a device must hold: one per file, each a function from plan to plan."""

from __future__ import annotations

from collections.abc import Callable

from hardware.registry import Registry
from simulator.plan import Strategy
from strategies.activation_offload import ActivationOffload
from strategies.attention_checkpointing import AttentionCheckpointing
from strategies.bitfit import BitFit
from strategies.block_checkpointing import BlockCheckpointing
from strategies.checkpointing import FullCheckpointing
from strategies.context_parallel import ContextParallel
from strategies.ddp import Ddp
from strategies.deepspeed.zero3 import DeepSpeedZero3
from strategies.deepspeed.zero12 import DeepSpeedZero1, DeepSpeedZero2
from strategies.freezing import Freezing
from strategies.fsdp1 import Fsdp1
from strategies.fsdp2 import Fsdp2
from strategies.gemini import Gemini
from strategies.interval_checkpointing import IntervalCheckpointing
from strategies.megatron import MegatronDistributedOptimizer
from strategies.module_checkpointing import ModuleCheckpointing
from strategies.op_checkpointing import OpCheckpointing
from strategies.tensor_parallel import TensorParallel
from strategies.uniform_checkpointing import UniformCheckpointing
from strategies.zero_redundancy import ZeroRedundancy

#: Makes a strategy from its options.
StrategyFactory = Callable[..., Strategy]

strategies: Registry[StrategyFactory] = Registry("strategy", "vramsim.strategies")
_BUILT_IN: tuple[StrategyFactory, ...] = (
    FullCheckpointing,
    IntervalCheckpointing,
    BlockCheckpointing,
    UniformCheckpointing,
    AttentionCheckpointing,
    ModuleCheckpointing,
    OpCheckpointing,
    ActivationOffload,
    Freezing,
    BitFit,
    TensorParallel,
    ContextParallel,
    Ddp,
    ZeroRedundancy,
    Fsdp1,
    Fsdp2,
    DeepSpeedZero1,
    DeepSpeedZero2,
    DeepSpeedZero3,
    MegatronDistributedOptimizer,
    Gemini,
)
for factory in _BUILT_IN:
    strategies.add(factory().name, factory)
