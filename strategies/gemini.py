"""ColossalAI Gemini: weights in chunks of equal size, sharded over the ranks, gathered when an op needs them.

Technique: Fang et al., PatrickStar, arXiv:2108.05818; Li et al., Colossal-AI, arXiv:2110.14883. Chunks as LLMem
(Kim et al., arXiv:2404.10933) estimates them. Behaviour: colossalai/zero/gemini/ at 4f9953be3 (file named per method).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import attrs

from hardware.dtypes import BF16, BOOL, FP16, FP32, INT32, DType
from hardware.errors import UnsupportedError, UsageError
from simulator.graph import COMPUTE, Op, Storage, Tensor
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.plan import Plan
from simulator.roles import Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import Dim, FlatSize, size_of, with_bits
from strategies.flat import Member, rank_pieces
from strategies.options import choice, flag, number, option
from strategies.rules import refuse_load_balancing, refuse_second_owner, refuse_tensor_parallel

#: Stream of `GeminiDDP.async_reduce_stream`.
REDUCE = "async_reduce"
OPTIMIZERS = ("adam", "adamw")
#: `init_chunk_manager` (chunk/utils.py): the step of the search without ``hidden_dim``, in elements.
SEARCH_INTERVAL = 1024
#: ``search_range_m`` and ``min_chunk_size_m`` count in so many elements, whatever their names in the code say.
MEGA = 1024**2


def _half(_: object, attribute: attrs.Attribute[DType], value: object) -> None:
    if value not in (FP16, BF16):
        raise UsageError(f"{attribute.name!r} must be fp16 or bf16: {value!r}")


@attrs.frozen(kw_only=True)
class Gemini:
    """`GeminiDDP` and `GeminiOptimizer` over mesh axis ``dp_shard``; ``dp_replicate`` is the extra group.

    Options and defaults are those of `GeminiPlugin` but for the last two. A chunk need not end where a layer does, so
    that layers are unlike each other and all of them are built. The optimizer is ColossalAI's own (HybridAdam,
    FusedAdam), which is fused whatever implementation the workload asks for. Casting buffers to 16 bits is left out.
    """

    precision: DType = option(FP16, _half, "element type of the working chunks, which gradients overwrite")
    shard_param_frac: float = option(1.0, number(0, 1), "share of chunk bytes to release when ops do not need them")
    search_range_m: float = option(32, number(0, 2**20), "chunk sizes to try, in 2^20 elements")
    min_chunk_size_m: float = option(
        32, number(0, 2**20), "smallest chunk, in 2^20 elements; smaller models stay whole"
    )
    hidden_dim: bool = option(False, flag, "search in steps of the hidden width instead of 1024 elements")
    placement_policy: str = option(
        "static", choice("static", "cuda"), "cuda, of older versions and LLMem, releases no chunk before its gradient"
    )
    keep_gathered_alone: bool = option(
        False, flag, "LLMem's patch: a rank alone keeps its chunks whole", "LLMem at 3d289b4"
    )
    name: str = attrs.field(default="gemini", init=False)
    axis: ClassVar[str] = "dp_shard"

    def __call__(self, plan: Plan) -> Plan:
        """The plan with weights in chunks; every layer is built."""
        self._check(plan)
        return attrs.evolve(plan, hooks=(*plan.hooks, self), compute=self.precision, unrolled=True)

    def _check(self, plan: Plan) -> None:
        training = plan.training
        refuse_second_owner(plan, self.name)
        refuse_tensor_parallel(plan, self.name)
        refuse_load_balancing(plan, self.name)
        if training.optimizer.name not in OPTIMIZERS:
            raise UnsupportedError(
                f"optimizer {training.optimizer.name} is not one of ColossalAI's for {self.name}; "
                f"use one of {', '.join(OPTIMIZERS)}"
            )
        if training.gradient_accumulation > 1 or training.zero_grad != "none":
            raise UnsupportedError(
                f"gradient_accumulation {training.gradient_accumulation} with zero_grad {training.zero_grad} "
                f"is not modelled with {self.name}: its gradients overwrite the weights; use 1 and none"
            )
        if not 0 <= plan.rank < plan.mesh.dp:
            raise UsageError(f"'rank' must be from 0 to {plan.mesh.dp - 1}, the data-parallel ranks: {plan.rank}")

    def start(self, job: Job) -> GeminiRuntime:
        """Search the chunk size and fill chunks."""
        return GeminiRuntime(job, self)


def _unused(sizes: Sequence[int], chunk_sizes: Sequence[int]) -> list[int]:
    """chunk/search_utils.py `_get_unused_byte`, for every chunk size at once: elements left over in chunks."""
    import numpy as np

    candidates = np.asarray(chunk_sizes, dtype=np.int64)
    wasted, left = np.zeros_like(candidates), np.zeros_like(candidates)
    for size in sizes:
        full = size > left
        wasted += np.where(full, left, 0)
        left = np.where(full, candidates, left) - size
    return [int(value) for value in wasted + left]


def search(sizes: Sequence[int], ranks: int, options: Gemini, interval: int) -> tuple[int, bool]:
    """chunk/search_utils.py `search_chunk_configuration`: elements of a chunk, and whether it stays gathered."""
    import numpy as np

    smallest = round(options.min_chunk_size_m * MEGA)
    if sum(sizes) < smallest:
        return sum(sizes), True
    array = np.array(sizes)
    usual = [size for size in sizes if size <= array.mean() + 3 * array.std()]
    start = -(-max(smallest, *usual) // interval) * interval
    candidates = range(start, start + round(options.search_range_m * MEGA) + 1, interval)
    wasted = _unused(usual, candidates)
    best = candidates[wasted.index(min(wasted))]
    return best + -best % ranks, False


def fill(weights: Iterable[tuple[Tensor, int | None, int]], chunk_size: int, ranks: int) -> list[list[Member]]:
    """chunk/manager.py `register_tensor`: a weight that does not fit opens a chunk, if need be as big as itself."""
    chunks: list[list[Member]] = []
    room = 0
    for tensor, layer, elements in weights:
        if not chunks or elements > room:
            chunks.append([])
            room = chunk_size if elements <= chunk_size else elements + -elements % ranks
        start = chunks[-1][-1].end if chunks[-1] else 0
        chunks[-1].append(Member(tensor, layer, start, start + elements))
        room -= elements
    return chunks


@attrs.frozen(eq=False)
class _Chunk:
    """A working chunk and its fp32 friend (chunk/chunk.py)."""

    members: tuple[Member, ...]
    dim: Dim
    elements: int
    whole: Storage
    """`cuda_global_chunk`."""
    shard: Storage
    """`cuda_shard`: weights, from reduction to the optimizer's step gradients."""
    main: Storage
    """The shard of the paired chunk."""
    checked: tuple[tuple[Storage, ...], tuple[Storage, ...]]
    """What the first check of `has_inf_or_nan` makes inside, and what the checks return, one after the other."""


class GeminiRuntime(Runtime):
    """`GeminiDDP`, its `ChunkManager`, `GeminiZeROHook` and placement policy."""

    weights_are_views = True

    def __init__(self, job: Job, options: Gemini) -> None:
        super().__init__(job)
        self.options = options
        self._ranks = job.plan.mesh.dp_shard
        self._rank = job.plan.rank % self._ranks
        bindings = job.plan.dimensions.bindings
        weights = [(t, layer, int(t.storage.size.elements(bindings))) for t, layer in job.weights()]
        interval = job.plan.model.hidden if options.hidden_dim else SEARCH_INTERVAL
        size, whole = search([elements for *_, elements in weights], self._ranks, options, interval)
        self._keeps_gathered = whole or (options.keep_gathered_alone and self._ranks == 1)
        self._chunks = [self._chunk(i, c, size) for i, c in enumerate(fill(weights, size, self._ranks))]
        self._chunk_of = {m.tensor.storage: chunk for chunk in self._chunks for m in chunk.members}
        self._kept = self._kept_gathered()
        self._trained = [self._parameter(*piece) for chunk in self._chunks for piece in self._pieces(chunk)]
        overflow = Storage("overflow_counter", size_of((), INT32.bits), INT32, Role.BUFFER, persistent=True)
        job.resident = [storage for chunk in self._chunks for storage in (chunk.shard, chunk.main)] + [overflow]
        self._gathered: list[_Chunk] = []
        """In the order of their numbers, as `get_cuda_movable_chunks` sorts them."""
        self._reduced: set[Storage] = set()
        """Weights that their gradients have overwritten (`READY_FOR_REDUCE`)."""

    # chunks --------------------------------------------------------------------------------------------------------

    def _chunk(self, number: int, members: Sequence[Member], chunk_size: int) -> _Chunk:
        own = members[-1].end
        elements = chunk_size if own <= chunk_size else own + -own % self._ranks
        dimensions = self.job.plan.dimensions
        dim = dimensions.bind("chunk", elements)
        shards: tuple[Dim, ...] = () if self._keeps_gathered else ("dp_shard",)
        dtype = self.options.precision
        size, part = (FlatSize(((1, (dim,)),), dtype.bits, shards=by) for by in ((), shards))
        label = f"chunk.{number}"
        shard = buffer(f"{label}.shard", part, dtype, Role.PARAMETER, stream=REDUCE)
        main = buffer(f"{label}.main", with_bits(part, FP32.bits), FP32, Role.MASTER_WEIGHT)
        main.persistent, shard.persistent = True, self._keeps_gathered
        whole = buffer(f"{label}.gathered", size, dtype, Role.GATHERED, stream=COMPUTE)
        return _Chunk(tuple(members), dim, elements, whole, shard, main, self._checked(label, elements, own))

    def _checked(self, label: str, elements: int, used: int) -> tuple[tuple[Storage, ...], tuple[Storage, ...]]:
        """What finding infinities (``abs() == inf`` in aten) among the rank's valid elements makes, and their norm."""
        share = elements // self._ranks
        valid = used if self._keeps_gathered else min(max(used - self._rank * share, 0), share)
        dim = self.job.plan.dimensions.bind("valid", valid)

        def made(name: str, dtype: DType) -> Storage:
            size = size_of((dim,), dtype.bits)
            return buffer(f"{label}.{name}", size, dtype, Role.REDUCE, stream=REDUCE)

        training = self.job.plan.training
        inside = (made("abs", self.options.precision),) if training.kernel_workspace else ()
        checks = (made("isinf", BOOL), made("isnan", BOOL))
        return inside, (*checks, made("float", FP32)) if training.clip is not None else checks

    def _kept_gathered(self) -> float:
        """placement_policy.py `setup_grads_device`, which counts a chunk once for each of its weights."""
        if self.options.placement_policy == "cuda":
            return float("inf")
        counted = sum(chunk.elements * len(chunk.members) for chunk in self._chunks)
        return counted * (1 - self.options.shard_param_frac)

    # gathering -----------------------------------------------------------------------------------------------------

    def before_op(self, op: Op) -> None:
        """gemini_hook.py `pre_op`: an op with weights is about to run, forward or backward."""
        used = [t.storage for t in op.inputs if t.storage in self._chunk_of]
        if not used or self._keeps_gathered:
            return
        self.job.recorder.module, self.job.recorder.slot = op.module, op.slot
        needed = list(dict.fromkeys(self._chunk_of[storage] for storage in used))
        self._evict(needed)
        for chunk in needed:
            if chunk not in self._gathered:
                self.job.allocate("all_gather", chunk.whole)
                self.job.free(chunk.shard)
                self._gathered = [each for each in self._chunks if each is chunk or each in self._gathered]

    before_node = before_op

    def _evict(self, needed: Sequence[_Chunk]) -> None:
        """placement_policy.py `StaticPlacementPolicy.evict_tensors`, of chunks without gradients in them."""
        free = [c for c in self._gathered if c not in needed and not any(self._is_reduced(m) for m in c.members)]
        total = sum(chunk.elements for chunk in free)
        for chunk in free:
            if total <= self._kept:
                break
            self._scatter(chunk)
            total -= chunk.elements

    def _is_reduced(self, member: Member) -> bool:
        return member.tensor.storage in self._reduced

    def _scatter(self, chunk: _Chunk) -> None:
        """chunk.py `__scatter` and `reduce`: the shard is made, then the whole let go."""
        self.job.allocate("empty", chunk.shard)
        self.job.free(chunk.whole)
        self._gathered = [each for each in self._gathered if each is not chunk]

    # gradients -----------------------------------------------------------------------------------------------------

    def accumulated(self, parameter: Storage) -> None:
        """gemini_ddp.py `grad_handle`: a gradient overwrites its weight; after its last the chunk is reduced."""
        gradient, chunk = self.job.gradients.pop(parameter), self._chunk_of[parameter]
        empty = attrs.evolve(gradient, label=f"{gradient.label}.empty_like", role=Role.REDUCE)
        self.job.allocate("empty_like", empty)
        self.job.free(empty)
        self._reduced.add(parameter)
        if all(self._is_reduced(member) for member in chunk.members):
            self._reduced -= {member.tensor.storage for member in chunk.members}
            self._reduce(chunk)
        self.job.free(gradient)

    def _reduce(self, chunk: _Chunk) -> None:
        if not self._keeps_gathered:
            self._scatter(chunk)
        inside, checks = chunk.checked
        for storage in inside:
            self.job.allocate("abs", storage)
        for storage in checks:
            self.job.allocate("has_inf_or_nan", storage)
            self.job.free(*inside, storage)
            inside = ()

    # optimizer -----------------------------------------------------------------------------------------------------

    def _pieces(self, chunk: _Chunk) -> list[tuple[_Chunk, str, tuple[Dim, ...]]]:
        """gemini_optimizer.py `__init__optimizer`: what of each weight lies in the rank's shard."""
        share = chunk.elements if self._keeps_gathered else chunk.elements // self._ranks
        first = 0 if self._keeps_gathered else self._rank * share
        pieces = rank_pieces(chunk.members, first, first + share, self.job.plan.dimensions)
        return [(chunk, label, dims) for _, label, dims in pieces]

    def _parameter(self, chunk: _Chunk, label: str, dims: tuple[Dim, ...]) -> Parameter:
        """`_set_grad_ptr`: a view of the fp32 chunk, whose gradient is one of the working chunk."""
        storage = Storage(label, size_of(dims, FP32.bits), FP32, Role.MASTER_WEIGHT, persistent=True)
        return Parameter(storage, chunk.shard, (dims,))

    def begin_backward(self, turn: Turn) -> None:
        """`_pre_backward`."""
        self._reduced.clear()

    def trainable(self, parameters: Sequence[Parameter]) -> list[Parameter]:
        """The pieces of weights in the rank's shards."""
        return self._trained

    def before_step(self, step: OptimizerStep) -> None:
        """HybridAdam and FusedAdam are fused, and count their steps on the host."""
        step.optimizer = attrs.evolve(step.optimizer, implementation="fused")
        for parameter in step.parameters:
            step.on_host(parameter, "step")

    def cleared(self, gradients: Sequence[Storage]) -> list[Storage]:
        """Nothing: the weights overwrite their gradients (`optim_update`)."""
        return []
