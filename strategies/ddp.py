"""Data parallel: whole weights on every rank, gradients all-reduced in buckets (`DistributedDataParallel`).

Technique: Li et al., PyTorch Distributed, VLDB 2020, arXiv:2006.15704, section 4.
Behaviour: torch 2.13 torch/csrc/distributed/c10d/reducer.cpp (function named per method) and
torch/nn/parallel/distributed.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError
from hardware.units import MIB
from simulator.graph import Storage, Tensor
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import FlatSize
from simulator.workload import MEGATRON
from strategies.options import choice, count, flag, option
from strategies.rules import refuse_second_owner

#: torch/csrc/distributed/c10d/reducer.hpp `kDefaultFirstBucketBytes`, and the default of `bucket_cap_mb`.
FIRST_BUCKET_BYTES, BUCKET_CAP_MB = MIB, 25


@attrs.frozen(kw_only=True)
class Ddp:
    """`DistributedDataParallel` over mesh axis ``dp_replicate``, with the options and defaults of its constructor.

    Buckets live from construction on: their bytes are those of all gradients, whatever the caps. After the first
    step they are rebuilt in the order in which gradients arrived, here taken as the reverse of ``parameters()``;
    they are priced as rebuilt from the beginning (before, all is one bucket: a difference of 512 B a bucket at most).
    """

    bucket_cap_mb: int = option(0, count(0, 2**40), "MiB of a bucket; 0 is torch's default: 25, the first 1")
    gradient_as_bucket_view: bool = option(False, flag, "gradients are views of the buckets, not copies")
    find_unused_parameters: bool = option(False, flag, "buckets are never rebuilt")
    static_graph: bool = option(False, flag, "the same parameters are used in every step")
    comm_hook: str = option(
        "none",
        choice("none", "bf16_compress", "fp16_compress"),
        "compress buckets for the all-reduce",
        "torch/distributed/algorithms/ddp_comm_hooks/default_hooks.py",
    )
    name: str = attrs.field(default="ddp", init=False)
    axis: ClassVar[str] = "dp_replicate"
    around_liger: ClassVar[bool] = True
    in_stages: ClassVar[bool] = True

    def __call__(self, plan: Plan) -> Plan:
        """The plan with buckets and their all-reduce."""
        refuse_second_owner(plan, self.name)
        if plan.training.implementation in MEGATRON:
            raise UnsupportedError(f"{self.name} around Megatron-LM's own code is not modelled: leave it out")
        if plan.tensor_parallel is not None:
            raise UnsupportedError(f"{self.name} on weights sharded along 'tp' is not modelled: use fsdp2")
        if self.comm_hook != "none":
            raise UnsupportedError(f"comm_hook {self.comm_hook} is not modelled yet: leave it out")
        return attrs.evolve(plan, hooks=(*plan.hooks, self))

    def start(self, job: Job) -> DdpRuntime:
        """Allocate the buckets."""
        return DdpRuntime(job, self)


class DdpRuntime(Runtime):
    """The `Reducer`."""

    unscales = True

    def __init__(self, job: Job, options: Ddp) -> None:
        super().__init__(job)
        self.options = options
        # stage.py `backward_maybe_with_nosync`: all backwards but the last under ``no_sync``
        self._staged = job.plan.pipeline is not None
        self.last_differs = self._staged and options.gradient_as_bucket_view
        self._last = False
        weights = [tensor for tensor, _ in job.weights()]
        groups = self.assign(weights)
        self.buckets = [self._bucket(number, group) for number, group in enumerate(groups)]
        job.resident = [*job.resident, *self.buckets]
        self._views = {t.storage: bucket for bucket, group in zip(self.buckets, groups, strict=True) for t in group}

    def assign(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """`compute_bucket_assignment_by_size`: a bucket is closed by the weight that reaches its cap."""
        order = weights if self.options.find_unused_parameters else reversed(weights)
        bindings, caps = self.job.plan.dimensions.bindings, self._caps()
        groups: list[list[Tensor]] = [[]]
        cap, filled = next(caps), 0
        for tensor in order:
            groups[-1].append(tensor)
            filled += tensor.storage.size.nbytes(bindings)
            if filled >= cap:
                groups.append([])
                cap, filled = next(caps), 0
        return [group for group in groups if group]

    def _caps(self) -> chain[int]:
        cap = (self.options.bucket_cap_mb or BUCKET_CAP_MB) * MIB
        return chain([cap if self.options.bucket_cap_mb else FIRST_BUCKET_BYTES], repeat(cap))

    @staticmethod
    def _bucket(number: int, group: Sequence[Tensor]) -> Storage:
        dtype = group[0].dtype
        size = FlatSize(tuple((1, tensor.dims) for tensor in group), dtype.bits)
        made = buffer(f"bucket.{number}", size, dtype, Role.BUCKET)
        made.persistent = True
        return made

    def begin_backward(self, turn: Turn) -> None:
        """`prepare_for_backward`, or not."""
        self._last = turn.last

    def accumulated(self, parameter: Storage) -> None:
        """`mark_variable_ready_dense`: the gradient is copied into its bucket, and replaced by its view there."""
        gradient = self.job.gradients[parameter]
        if self._staged and not self._last:
            return
        if self.options.gradient_as_bucket_view and not gradient.persistent:
            self.job.free(gradient)
            self.job.gradients[parameter] = self._views[parameter]
