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
    handed_on: str = ""
    """What layers call it that hand it on to their neighbours, whatever their kinds; empty for what they do not."""


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
    births: list[Storage] = attrs.field(factory=list)
    """What it makes: the edges from it, as they are written down; those to it are the next three."""
    reads: list[Storage] = attrs.field(factory=list)
    saves: list[Storage] = attrs.field(factory=list)
    holds: list[Storage] = attrs.field(factory=list)
    packed: tuple[Tensor, ...] = ()
    """What it saves as hooks on saved tensors see it: one tensor after the other, weights among them."""
    fused: bool = False
    """Whether a compiler makes it, and its backward, part of a kernel with its neighbours."""
    turn: int | None = None
    """The layer whose turn it is in a loop over layers that is outside of them: how often it runs is said by that."""

    @property
    def place(self) -> int | None:
        """The layer whose repeats its steps follow, whether or not it is part of that layer; None outside the stack."""
        return self.slot if self.turn is None else self.turn


@attrs.define(eq=False)
class ForwardGraph:
    """The forward pass of one micro-batch: the graph, its ops in execution order, its parameters."""

    ops: list[Op] = attrs.field(factory=list)
    parameters: list[Tensor] = attrs.field(factory=list)
    buffers: list[Tensor] = attrs.field(factory=list)
    inputs: list[Tensor] = attrs.field(factory=list)
    arguments: dict[int, list[Storage]] = attrs.field(factory=dict)
    """What each built layer is called with; checkpointing keeps it for recomputation."""
    entered: dict[int, Tensor] = attrs.field(factory=dict)
    """The hidden states among them."""
    positional: dict[int, int] = attrs.field(factory=dict)
    """How many of those are handed over by position, the hidden states among them."""
    outside: int | None = None
    """Index of the first op outside the model (a loss that the caller computes); None where all are inside."""
    idle: dict[int, list[tuple[str, int | None]]] = attrs.field(factory=dict)
    """Modules that run no op (dropout at rate 0), by the index of the op after them: dotted path and layer."""
    placements: dict[Storage, str | None] = attrs.field(factory=dict)
    """Weights that are DTensors -> the kernel that brings the gradient autograd leaves to the weight's placement, in
    the optimizer or in a framework's hook; None where it has that placement."""
    expert_parallel: set[Storage] = attrs.field(factory=set)
    """Weights of experts, of which each rank along ``ep`` has its own."""
    loss: Tensor | None = None
    outputs: tuple[Tensor, ...] = ()
    """What the caller's frame may keep after forward (the logits)."""
    held: tuple[Tensor, ...] = ()
    """What it keeps through backward in any case, besides the loss."""
    stages: list[StageGraph] = attrs.field(factory=list)
    """The stages of a pipeline that the rank has; none where there is no pipeline."""

    _edges: nx.DiGraph[Any] | None = attrs.field(default=None, init=False)

    @property
    def edges(self) -> nx.DiGraph[Any]:
        """The graph itself, made of what the ops have when somebody asks first; from then on it alone counts."""
        if self._edges is None:
            self._edges = self._digraph()
        return self._edges

    def _digraph(self) -> nx.DiGraph[Any]:
        import networkx as nx

        edges: nx.DiGraph[Any] = nx.DiGraph()
        edges.add_nodes_from(tensor.storage for tensor in (*self.inputs, *self.parameters, *self.buffers))
        for op in self.ops:
            edges.add_node(op)
            edges.add_edges_from((storage, op, {"reads": True}) for storage in op.reads)
            edges.add_edges_from((op, storage) for storage in op.births)
            edges.add_edges_from((storage, op, {"saves": True}) for storage in op.saves)
            edges.add_edges_from((storage, op, {"holds": True}) for storage in op.holds)
        return edges

    def uses(self, op: Op) -> Uses:
        """The storages that `op` reads, saves and holds."""
        if self._edges is None:
            holds = op.holds if len(op.holds) < 2 else in_order(op.holds, [*op.reads, *op.saves])
            return Uses(op.reads, op.saves, holds)
        found = Uses([], [], [])
        for storage, edge in self._edges.pred[op].items():
            if "reads" in edge:
                found.reads.append(storage)
            if "saves" in edge:
                found.saves.append(storage)
            if "holds" in edge:
                found.holds.append(storage)
        return found

    def births(self, op: Op) -> list[Storage]:
        """The storages that `op` makes."""
        return op.births if self._edges is None else list(self._edges.succ[op])


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


def in_order(storages: list[Storage], before: list[Storage]) -> list[Storage]:
    """`storages` in the order of their edges, in which they are released: those that have one `before` come first."""
    if len(storages) < 2:
        return storages
    first = [storage for storage in dict.fromkeys(before) if storage in storages]
    return [*first, *(storage for storage in storages if storage not in first)]


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
