"""Megatron-LM's data parallelism: contiguous buffers of weights and gradients, an optimizer sharded over them.

Technique: Rajbhandari et al., arXiv:1910.02054, section 5 (P_os), on flat buffers; Megatron-LM
docs/user-guide/features/dist_optimizer.md. Behaviour: megatron/core at d98e8a64 and as released in 0.16.1
(distributed/param_and_grad_buffer.py, optimizer/distrib_optimizer.py, optimizer/optimizer.py; function named per
method).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import ClassVar

import attrs

from hardware.dtypes import BF16, FP32, INT16, DType
from hardware.errors import UnsupportedError, UsageError
from simulator.graph import Storage, Tensor
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import Dim, FlatSize, JoinedSize, size_of
from simulator.workload import MEGATRON
from strategies.flat import Member, rank_pieces
from strategies.options import count, flag, option, training_dtype
from strategies.rules import refuse_second_owner, refuse_tensor_parallel

#: A weight starts at a multiple of so many elements (optimizer/param_layout.py `pad_param_start`).
PARAMETER_ALIGNMENT = 64
#: Bucket ends are multiples of this and of the ranks, and of the other if so asked (`bucket_end_divisor`).
BUCKET_ALIGNMENT, HIGH_BANDWIDTH_ALIGNMENT = 128, 2**16
#: `DistributedDataParallel.__init__`: the default bucket is the larger of these, in elements, the second a rank.
BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK = 40_000_000, 1_000_000
#: Linear layers that may add to the buffer of gradients themselves.
FUSED_KERNELS = (["mm.default"], ["addmm.default"], ["grouped_gemm"])
OPTIMIZERS = ("adam", "adamw", "sgd")


@attrs.frozen(kw_only=True)
class MegatronDistributedOptimizer:
    """Megatron's `DistributedDataParallel` and `DistributedOptimizer` over mesh axes ``dp_shard`` and ``cp``.

    With ``dp_replicate`` above 1 these are the distributed optimizer instances. Options and defaults are those of
    `DistributedDataParallelConfig` and `OptimizerConfig` but for the two whose help says otherwise. Gather and
    reduce-scatter work in place in the buffers, whether they overlap or not. Without Transformer Engine, fusing
    gradient accumulation saves nothing: a dummy as big as the gradient is made for each weight all the same.
    ``fused`` optimizers stand for FusedAdam of Transformer Engine or Apex, which counts steps on the host; the
    others for torch's own.
    """

    use_distributed_optimizer: bool = option(
        True, flag, "shard the optimizer, and lay weights out in one buffer (the config's default is false)"
    )
    grad_reduce_in_fp32: bool = option(
        True,
        flag,
        "gradients are summed and reduced in fp32, as training in bf16 sets it (the config's default is false)",
        "megatron/training/arguments.py validate_args",
    )
    overlap_grad_reduce: bool = option(False, flag, "several buckets, so that their reduction overlaps with backward")
    bucket_size: int = option(0, count(0), "elements of a bucket; 0 is the larger of 40e6 and 1e6 a rank")
    pad_buckets_for_high_nccl_busbw: bool = option(False, flag, "bucket ends at multiples of 2^16 elements, too")
    gradient_accumulation_fusion: bool = option(
        False,
        flag,
        "weight gradients of linear layers go straight to their buffer; Transformer Engine's dummies stand for them",
        "megatron/core/tensor_parallel/layers.py LinearWithGradAccumulationAndAsyncCommunication",
    )
    use_precision_aware_optimizer: bool = option(False, flag, "FusedAdam holds main weights and narrow moments")
    store_param_remainders: bool = option(True, flag, "of bf16 weights FusedAdam holds the 16 bits that fp32 adds")
    exp_avg_dtype: DType | None = option(None, training_dtype, "element type of the first moment; none is fp32")
    exp_avg_sq_dtype: DType | None = option(None, training_dtype, "element type of the second moment; none is fp32")
    name: str = attrs.field(default="megatron_distributed_optimizer", init=False)
    axis: ClassVar[str] = "dp_shard"
    on_one_gpu: ClassVar[bool] = True
    """Its buffers and main weights are there whatever the number of ranks."""

    def __call__(self, plan: Plan) -> Plan:
        """The plan with buffers and their optimizer."""
        self._check(plan)
        return attrs.evolve(plan, hooks=(*plan.hooks, self))

    def _check(self, plan: Plan) -> None:
        training, ranks = plan.training, plan.mesh.dp_cp
        refuse_second_owner(plan, self.name)
        if training.implementation not in MEGATRON:
            refuse_tensor_parallel(plan, self.name)
        if training.optimizer.name not in OPTIMIZERS:
            raise UnsupportedError(
                f"optimizer {training.optimizer.name} is not modelled with {self.name}; "
                f"use one of {', '.join(OPTIMIZERS)}"
            )
        if training.zero_grad != "none":
            raise UnsupportedError(f"zero_grad {training.zero_grad} is not what {self.name} does: leave it at none")
        if not 0 <= plan.rank < ranks:
            raise UsageError(f"'rank' must be from 0 to {ranks - 1}, the ranks along dp and cp: {plan.rank}")
        self._check_precision(plan)

    def _check_precision(self, plan: Plan) -> None:
        moments = (self.exp_avg_dtype, self.exp_avg_sq_dtype)
        if not self.use_precision_aware_optimizer:
            if any(dtype not in (None, FP32) for dtype in moments):
                raise UsageError("'exp_avg_dtype' must be fp32 without use_precision_aware_optimizer: set that, too")
            return
        optimizer = plan.training.optimizer
        if not self.use_distributed_optimizer:
            raise UsageError("'use_precision_aware_optimizer' must go with use_distributed_optimizer: set that, too")
        if optimizer.name not in ("adam", "adamw") or optimizer.implementation != "fused":
            raise UsageError(
                f"'use_precision_aware_optimizer' must go with fused adam or adamw: {optimizer.implementation} "
                f"{optimizer.name}; change the optimizer"
            )

    def start(self, job: Job) -> MegatronRuntime:
        """Allocate the buffers and the main weights."""
        return MegatronRuntime(job, self)


@attrs.frozen(eq=False)
class _Part:
    """A buffer's weights, and the ranks that share it: those of experts are fewer (`expert_parallel_params`)."""

    buckets: list[list[Member]]
    shards: int
    rank: int
    """The simulated one, among them."""
    multiple: Dim
    """What bucket ends are multiples of."""
    prefix: str = ""


@attrs.frozen(eq=False)
class _Piece:
    """What of a weight this rank updates."""

    part: _Part
    tensor: Tensor
    label: str
    slot: int | None
    dims: tuple[Dim, ...]


class MegatronRuntime(Runtime):
    """`_ParamAndGradBuffer`, the hooks of `DistributedDataParallel`, and the optimizer around the inner one."""

    def __init__(self, job: Job, options: MegatronDistributedOptimizer) -> None:
        super().__init__(job)
        self.options = options
        self._weights = job.plan.training.weights
        self._narrow = self._weights.bits < FP32.bits
        self._gradients = FP32 if options.grad_reduce_in_fp32 or not self._narrow else self._weights
        self._distributed = options.use_distributed_optimizer
        self._parts = self._split()
        self._grad_data = {part: self._buffer(part, "grad_data", self._gradients, Role.BUCKET) for part in self._parts}
        self._trained = [self._parameter(piece) for piece in self._pieces()]
        copies = [p.storage for p in self._trained] if self._holds_main_weights else []
        buffers = self._grad_data.values()
        self._main_gradients = [p.gradient for p in self._trained if p.gradient not in buffers]
        self.first_differs = self.cold_differs = bool(self._main_gradients)
        self._fused = self._fused_weights() if options.gradient_accumulation_fusion else frozenset()
        job.resident = [*self._model_weights(), *buffers, *copies, *self._dummies()]

    # buffers -------------------------------------------------------------------------------------------------------

    def _split(self) -> list[_Part]:
        """`DistributedDataParallel.__init__`: weights of experts have buffers of their own, in each model chunk.

        Ranks with different experts are neighbours (megatron/core/parallel_state.py, order "tp-cp-ep-dp-pp").
        """
        mesh, experts = self.job.plan.mesh, self.job.graph.expert_parallel
        rank, chunks = self.job.plan.rank % mesh.dp_shard_cp, self._weights_of_chunks()
        parts = []
        for number, weights in enumerate(chunks):
            chunk = f"chunk{number}." if len(chunks) > 1 else ""
            for prefix, shards, own, inside in (
                ("", mesh.dp_shard_cp, rank, False),
                ("expert_", mesh.expert_shards, rank // mesh.ep, True),
            ):
                among = [(tensor, layer) for tensor, layer in weights if (tensor.storage in experts) == inside]
                if among:
                    multiple = self.job.plan.dimensions.bind(f"{prefix}bucket_multiple", self._bucket_multiple(shards))
                    parts.append(_Part(self._assign(among, number), shards, own, multiple, chunk + prefix))
        return parts

    def _bucket_multiple(self, shards: int) -> int:
        """`bucket_end_divisor`; without a distributed optimizer nothing is padded."""
        wide = HIGH_BANDWIDTH_ALIGNMENT if self.options.pad_buckets_for_high_nccl_busbw else 1
        return math.lcm(shards, BUCKET_ALIGNMENT, wide) if self._distributed else 1

    @property
    def _alignment(self) -> int:
        return PARAMETER_ALIGNMENT if self._distributed else 1

    def _weights_of_chunks(self) -> list[list[tuple[Tensor, int | None]]]:
        """Each model chunk of a pipeline's rank is wrapped by itself."""
        weights, pipeline = self.job.weights(), self.job.plan.pipeline
        if pipeline is None:
            return [weights]
        ends = list(accumulate(len(chunk.layers) for chunk in pipeline.chunks))
        chunks: list[list[tuple[Tensor, int | None]]] = [[] for _ in ends]
        started = False
        for tensor, layer in weights:  # embeddings belong to the first chunk, the last norm and the head to the last
            started = started or layer is not None
            outside = len(ends) - 1 if started else 0
            chunks[outside if layer is None else bisect_right(ends, layer)].append((tensor, layer))
        return chunks

    def _is_bucketed(self, chunk: int) -> bool:
        """Only the first chunk of a pipeline's first rank has several buckets (`DistributedDataParallel.__init__`)."""
        pipeline = self.job.plan.pipeline
        first = chunk == 0 and (pipeline is None or pipeline.chunks[0].stage == 0)
        return self.options.overlap_grad_reduce and first

    def _assign(self, weights: Sequence[tuple[Tensor, int | None]], chunk: int) -> list[list[Member]]:
        """`_compute_per_buffer_param_layout`: in the order of backward, a bucket is closed by what fills it."""
        bucketed = self._is_bucketed(chunk)
        bindings, ranks = self.job.plan.dimensions.bindings, self.job.plan.mesh.dp
        limit = self.options.bucket_size or max(BUCKET_ELEMENTS, BUCKET_ELEMENTS_PER_RANK * ranks)
        buckets: list[list[Member]] = [[]]
        end = 0
        for tensor, layer in reversed(weights):
            start = end + -end % self._alignment
            end = start + int(tensor.storage.size.elements(bindings))
            buckets[-1].append(Member(tensor, layer, start, end))
            if bucketed and end >= limit:
                buckets.append([])
                end = 0
        return [bucket for bucket in buckets if bucket]

    def _buffer(self, part: _Part, label: str, dtype: DType, role: Role) -> Storage:
        """All buckets, one after the other."""
        sizes = tuple(self._size(part, bucket, dtype) for bucket in part.buckets)
        made = buffer(f"{part.prefix}{label}", JoinedSize(sizes), dtype, role)
        made.persistent = True
        return made

    def _size(self, part: _Part, bucket: Sequence[Member], dtype: DType) -> FlatSize:
        counts: dict[tuple[Dim, ...], int] = {}
        for member in bucket[:-1]:
            counts[member.tensor.dims] = counts.get(member.tensor.dims, 0) + 1
        members = (*((n, dims) for dims, n in counts.items()), (1, bucket[-1].tensor.dims))
        return FlatSize(members, dtype.bits, self._alignment, last_padded=False, total_multiple=(part.multiple,))

    def _model_weights(self) -> list[Storage]:
        """In one buffer with a distributed optimizer, whose gather is in place; else where they were."""
        if self._distributed:
            return [self._buffer(part, "param_data", self._weights, Role.PARAMETER) for part in self._parts]
        return self.job.resident

    def _fused_weights(self) -> frozenset[Storage]:
        """Weights that one linear layer reads and nothing else does."""
        kernels: dict[Storage, list[str]] = {}
        for op in self.job.graph.ops:
            if not all(output.is_view for output in op.outputs):
                for storage in {tensor.storage for tensor in op.inputs}:
                    kernels.setdefault(storage, []).append(op.name)
        matrices = [tensor.storage for tensor in self.job.graph.parameters if len(tensor.shape) == 2]
        return frozenset(s for s in matrices if kernels.get(s) in FUSED_KERNELS)

    def _dummies(self) -> list[Storage]:
        """Transformer Engine's `get_dummy_wgrad`: one for each shape, for ever (counted from the beginning)."""
        shapes = dict.fromkeys(t.dims for t in self.job.graph.parameters if t.storage in self._fused)
        made = []
        for number, dims in enumerate(shapes):
            size = size_of(dims, self._weights.bits)
            made.append(buffer(f"dummy_wgrad.{number}", size, self._weights, Role.GRADIENT))
            made[-1].persistent = True
        return made

    # the optimizer's view ------------------------------------------------------------------------------------------

    @property
    def _holds_main_weights(self) -> bool:
        """Whether Megatron itself keeps fp32 copies (`_build_model_and_main_param_groups`)."""
        return self._narrow and not self.options.use_precision_aware_optimizer

    def _pieces(self) -> Iterator[_Piece]:
        """`_build_model_gbuf_range`: the rank's equal part of every bucket; else every weight."""
        if not self._distributed:
            members = ((part, member) for part in self._parts for bucket in part.buckets for member in bucket)
            owners = {member.tensor.storage: part for part, member in members}
            for tensor in self.job.graph.parameters:
                part = owners[tensor.storage]
                yield _Piece(part, tensor, tensor.storage.label, tensor.storage.slot, tensor.dims)
            return
        dimensions = self.job.plan.dimensions
        for part in self._parts:
            for bucket in part.buckets:
                share = self._size(part, bucket, self._weights).elements(dimensions.bindings) // part.shards
                first = part.rank * share
                for tensor, label, dims in rank_pieces(bucket, first, first + share, dimensions):
                    yield _Piece(part, tensor, label, None, dims)

    def _parameter(self, piece: _Piece) -> Parameter:
        """The main weight and its gradient: a view of the buffer, or an fp32 copy of that (`.float()`).

        Vectors are in a parameter group of their own, which does not decay (`_get_param_groups`); experts have an
        optimizer of their own, which comes second (`ChainedOptimizer`).
        """
        dtype = FP32 if self._holds_main_weights else self._weights
        role = Role.MASTER_WEIGHT if self._holds_main_weights else Role.PARAMETER
        size = size_of(piece.dims, dtype.bits)
        storage = Storage(f"{piece.label}.main", size, dtype, role, piece.slot, persistent=True)
        gradient = self._grad_data[piece.part]
        if self._holds_main_weights and self._gradients != FP32:
            gradient = Storage(f"{piece.label}.main_grad", size, FP32, Role.GRADIENT, piece.slot)
        shape = piece.tensor.shape if piece.dims == piece.tensor.dims else (piece.dims,)
        return Parameter(storage, gradient, shape, group=2 * bool(piece.part.prefix) + int(len(piece.tensor.shape) < 2))

    # moments -------------------------------------------------------------------------------------------------------

    def begin_forward(self, turn: Turn) -> None:
        """``optimizer.zero_grad()``, which the training loop calls before each step, frees fp32 copies of gradients."""
        if turn.first and not turn.cold:
            self.job.free(*self._main_gradients)

    def accumulated(self, parameter: Storage) -> None:
        """`_make_backward_post_hook`: the gradient is added to its place in the buffer and dropped."""
        gradient = self.job.gradients.pop(parameter)
        if parameter in self._fused and self.job.recorder.references(gradient) == 1:
            self.job.recorder.unmake(gradient)
        else:
            self.job.free(gradient)

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """The rank's pieces of weights."""
        return self._trained

    def before_step(self, step: OptimizerStep) -> None:
        """`_copy_model_grads_to_main_grads`; then what FusedAdam keeps otherwise than torch."""
        for gradient in self._main_gradients:
            step.allocate("float", gradient)
        if step.optimizer.implementation == "fused":
            for parameter in step.parameters:
                step.on_host(parameter, "step")
        if self.options.use_precision_aware_optimizer:
            for parameter in step.parameters:
                self._precision_aware_states(step, parameter)

    def _precision_aware_states(self, step: OptimizerStep, parameter: Parameter) -> None:
        """Transformer Engine's transformer_engine/pytorch/optimizers/fused_adam.py `initialize_state`."""
        remainders = self.options.store_param_remainders and self._weights == BF16
        states = {"exp_avg": self.options.exp_avg_dtype, "exp_avg_sq": self.options.exp_avg_sq_dtype}
        if self._narrow:
            states["master_param"] = INT16 if remainders else FP32
        for name, dtype in states.items():
            step.state(parameter, name, parameter.dims, dtype or FP32, "empty_like.default")
            if dtype not in (None, FP32, INT16):
                step.state(parameter, f"{name}.scale", (), FP32, "ones.default")

    def cleared(self, gradients: Sequence[Storage]) -> list[Storage]:
        """Nothing after the step: `zero_grad` comes before the next."""
        return []
