"""The forward graph: ops and storages in one bipartite networkx `DiGraph`.

An edge ``op -> storage`` says who makes it; an edge ``storage -> op`` says why it must still
be there: ``reads`` (the kernel needs it), ``saves`` (autograd keeps it until that op's
backward has run) or ``holds`` (a Python local or the caller's frame keeps it until then).
Liveness is derived from these edges and from nothing else: remove one and a lifetime changes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import attrs

from hardware.dtypes import DType
from simulator.roles import Role
from simulator.sizes import AnySize, Dim, size_of

if TYPE_CHECKING:
    import networkx as nx

    from simulator.autograd import Autograd

#: The stream that kernels run on unless a framework says otherwise.
COMPUTE = "compute"
#: The part of an attention module between its projections.
ATTENTION_CORE = "core_attention"
#: A tensor's logical shape: each axis is a group of dimensions, e.g. ``(("b",), ("s",), ("a", "d"))``.
Shape = tuple[tuple[Dim, ...], ...]


@attrs.define(eq=False)
class Storage:
    """One allocation: how big, of what element type, for what purpose, made by which layer."""

    label: str
    size: AnySize
    dtype: DType
    role: Role
    slot: int | None = None
    """Index of the layer that makes it; None outside the layer stack."""
    persistent: bool = False
    """Parameters and buffers: alive before the first step and after the last."""
    cached_by_autocast: bool = False
    """A weight's copy in autocast's cache, which keeps it until autocast ends."""
    whole: AnySize | None = None
    """Size in the model that ranks share a weight of; None where each rank holds all of it."""
    stream: str = COMPUTE
    """The CUDA stream it is allocated on: blocks never move from one stream's pool to another's."""


@attrs.define(eq=False)
class Tensor:
    """A view of a storage: logical shape, memory order of its dimensions, and where its gradient goes."""

    storage: Storage
    shape: Shape
    memory: tuple[Dim, ...]
    """Dimensions from the slowest to the fastest varying in memory."""
    dtype: DType
    requires_grad: bool = False
    producer: int | None = None
    """Index in `ForwardGraph.ops` of the op that makes it; None for leaves and where no gradient flows."""
    output_index: int = 0
    is_view: bool = False
    dense: bool = True
    """Whether it covers its memory without gaps; a slice does not."""

    @property
    def dims(self) -> tuple[Dim, ...]:
        """All dimensions in logical order."""
        return flat(self.shape)

    @property
    def contiguous(self) -> bool:
        """Whether memory order is logical order, without gaps."""
        return self.dense and self.dims == self.memory

    @property
    def is_parameter(self) -> bool:
        """Whether this is a leaf that accumulates a gradient."""
        return self.producer is None and self.requires_grad


#: Computes the gradients of an op's inputs from the gradients of its outputs.
BackwardRule = Callable[["Autograd", "Op", list["Tensor | None"]], list["Tensor | None"]]


@attrs.define(eq=False)
class Op:
    """One dispatcher-level operation of the forward pass."""

    name: str
    module: str
    slot: int | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    backward: BackwardRule | None = None
    saves_late: bool = False
    """Whether what it saves is packed after the kernel ran, not before: an output, or by a function in Python."""
    only_saved: bool = False
    """Whether it stands for turns of a loop that are not built: it makes what is saved of them, and nothing else."""
    part: str = ""
    """The part of its module that it belongs to, where that part has a name but no module of its own."""
    only_recorded: tuple[Storage, ...] = ()
    """What it makes for the sake of backward alone: not under ``torch.no_grad``."""
    attributes: dict[str, Any] = attrs.field(factory=dict)
    fused: bool = False
    """Whether a compiler makes it, and its backward, part of a kernel with its neighbours."""


@attrs.define(eq=False)
class ForwardGraph:
    """The forward pass of one micro-batch: the graph, its ops in execution order, its parameters."""

    edges: nx.DiGraph[Any]
    ops: list[Op] = attrs.field(factory=list)
    parameters: list[Tensor] = attrs.field(factory=list)
    buffers: list[Tensor] = attrs.field(factory=list)
    inputs: list[Tensor] = attrs.field(factory=list)
    arguments: dict[int, list[Storage]] = attrs.field(factory=dict)
    """What each built layer is called with; checkpointing keeps it for recomputation."""
    positional: dict[int, int] = attrs.field(factory=dict)
    """How many of those are handed over by position, the hidden states among them."""
    outside: int | None = None
    """Index of the first op outside the model (a loss that the caller computes); None where all are inside."""
    idle: dict[int, list[tuple[str, int | None]]] = attrs.field(factory=dict)
    """Modules that run no op (dropout at rate 0), by the index of the op after them: dotted path and layer."""
    placements: dict[Storage, str | None] = attrs.field(factory=dict)
    """Weights that are DTensors -> the kernel that brings the gradient autograd leaves to the weight's placement, in
    the optimizer or in a framework's hook; None where it has that placement."""
    loss: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()
    """What the caller's frame may keep after forward (the logits)."""
    held: tuple[Tensor, ...] = ()
    """What it keeps through backward in any case, besides the loss."""
    stages: list[StageGraph] = attrs.field(factory=list)
    """The stages of a pipeline that the rank has; none where there is no pipeline."""

    def uses(self, op: Op) -> Uses:
        """The storages that `op` reads, saves and holds."""
        found = Uses([], [], [])
        for storage, edge in self.edges.pred[op].items():
            if "reads" in edge:
                found.reads.append(storage)
            if "saves" in edge:
                found.saves.append(storage)
            if "holds" in edge:
                found.holds.append(storage)
        return found

    def births(self, op: Op) -> list[Storage]:
        """The storages that `op` makes."""
        return list(self.edges.succ[op])


@attrs.define(eq=False)
class StageGraph:
    """The part of a forward graph that is one stage of a pipeline."""

    first_op: int
    end_op: int = 0
    loss_op: int | None = None
    """Index of the first op of the loss function, which the schedule calls after the stage; None without one."""
    received: Tensor | None = None
    output: Tensor | None = None
    """What the stage returns: hidden states that are sent, or logits."""
    loss: Tensor | None = None

    def gradient_received(self) -> Tensor:
        """The gradient of `output` that the next stage sends, in a buffer that is there already."""
        assert self.output is not None
        if self._gradient is None:
            like = self.output
            storage = Storage("received", like.storage.size, like.dtype, Role.RECEIVED, persistent=True)
            self._gradient = make_tensor(storage, like.shape, like.dtype)
        return self._gradient

    _gradient: Tensor | None = attrs.field(default=None, init=False)


@attrs.frozen(eq=False)
class Uses:
    """Why one op needs storages; see the module's docstring."""

    reads: list[Storage]
    saves: list[Storage]
    holds: list[Storage]


@lru_cache(maxsize=4096)
def flat(shape: Shape) -> tuple[Dim, ...]:
    """All dimensions of a shape in logical order."""
    return tuple(d for axis in shape for d in axis)


def make_storage(label: str, dims: tuple[Dim, ...], dtype: DType, role: Role, slot: int | None = None) -> Storage:
    """A storage of `dims` elements of `dtype`."""
    return Storage(label, size_of(dims, dtype.bits), dtype, role, slot)


def make_tensor(storage: Storage, shape: Shape, dtype: DType) -> Tensor:
    """A contiguous tensor that covers `storage`."""
    return Tensor(storage, shape, flat(shape), dtype)
