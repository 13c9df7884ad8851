"""`BF16_Optimizer`, which DeepSpeed takes for ZeRO-1 with bf16 weights and fp32 gradients.

Gradients are added to an fp32 buffer of the whole model on every rank, after each backward.
Behaviour: DeepSpeed 0.19.8 deepspeed/runtime/bf16_optimizer.py (function named per method), with
``immediate_grad_update`` false, and deepspeed/runtime/engine.py `allreduce_bucket`.
"""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import FP32
from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import with_bits
from strategies.deepspeed.partition import flat_size, partition_dim


class Bf16OptimizerRuntime(Runtime):
    """`_setup_for_real_optimizer`, `update_hp_grads`, `step`."""

    clips = True

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.last_differs = job.plan.training.gradient_accumulation > 1
        weights = job.plan.training.weights
        self._flat = buffer("flat parameters", flat_size(job, weights.bits), weights, Role.PARAMETER)
        self._master = buffer("fp32 partition", flat_size(job, FP32.bits, partition=True), FP32, Role.MASTER_WEIGHT)
        self._sums = buffer("fp32 gradients", flat_size(job, FP32.bits), FP32, Role.GRADIENT)
        for storage in (self._flat, self._master, self._sums):
            storage.persistent = True
        job.keep_instead([self._flat, self._master, self._sums])
        self._last = True

    def begin_backward(self, turn: Turn) -> None:
        """Gradients are all-reduced after the last micro-batch."""
        self._last = turn.last

    def end_backward(self) -> None:
        """`update_hp_grads`: each gradient in fp32, one at a time; then the all-reduce, in the weights' type."""
        recorder = self.job.recorder
        recorder.module = "update_hp_grads"
        for tensor in self.job.graph.parameters:
            storage = tensor.storage
            recorder.slot = storage.slot
            size = with_bits(storage.size, FP32.bits)
            self._pass("_to_copy", buffer(f"{storage.label}.fp32", size, FP32, Role.REDUCE, storage.slot))
        recorder.slot = None
        if self._last and self._flat.dtype != FP32:
            self._pass("all_reduce", buffer("all-reduced", self._flat.size, self._flat.dtype, Role.REDUCE))

    def _pass(self, name: str, storage: Storage) -> None:
        self.job.allocate(name, storage)
        self.job.free(storage)

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """One flat parameter, whose gradient is a view of the buffer."""
        return [Parameter(self._master, self._sums, ((partition_dim(self.job),),))]

    def after_step(self, step: OptimizerStep) -> None:
        """`zero_grad` of the engine: only now the low-precision gradients go."""
        step.free(list(self.job.gradients.values()))
