"""Recipes write a forward pass down through this: ops, modules, and the Python names that keep tensors alive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from hardware.dtypes import DType
from hardware.errors import UnsupportedError
from simulator.frame import Call
from simulator.frame import Frame as Frame
from simulator.graph import (
    BackwardRule,
    ForwardGraph,
    Op,
    Shape,
    StageGraph,
    Storage,
    Tensor,
    flat,
    in_order,
    make_storage,
    make_tensor,
)
from simulator.pipelines.pipeline import MICRO_BATCHES, Stage
from simulator.regime import Regime as Regime
from simulator.roles import Role
from simulator.sizes import Dim, Dimensions, Value, product, size_of
from simulator.tensor_parallel import AXIS, DTENSOR, Style
from simulator.workload import MEGATRON


class Trace:
    """Builds a `ForwardGraph` op by op."""

    def __init__(
        self, regime: Regime, dimensions: Dimensions, frozen: Callable[[str, int | None], bool] = lambda *_: False
    ) -> None:
        self.regime = regime
        self.dimensions = dimensions
        self._frozen = frozen
        self.graph = ForwardGraph()
        self.slot: int | None = None
        self.stage = Stage()
        """The part of the model that is being built."""
        self.module = ""
        """Dotted path of the module being run."""
        self._shards: dict[Dim, tuple[Dim, ...]] = {}
        self._casts: dict[Tensor, Tensor] = {}
        self._squeezed: dict[tuple[Shape, int], Shape] = {}
        self._role = Role.ACTIVATION
        self._numbers: Counter[str] = Counter()
        self._part = ""
        self._turn: int | None = None
        self.router_logits: dict[int, Tensor] = {}
        """What the routers of the layers returned as logits, by slot (transformers' ``capture_outputs``)."""

    # names ---------------------------------------------------------------------------------------------------------

    def dim(self, name: str, value: Value) -> str:
        """Bind a dimension and return the name under which it is known."""
        return self.dimensions.bind(name, value)

    # tensor parallelism --------------------------------------------------------------------------------------------

    def style(self, module: str) -> Style | None:
        """How module `module` is sharded along ``tp``; None where it is not."""
        parallel = self.regime.tensor_parallel
        return parallel.style(self.regime.implementation, module) if parallel else None

    def shard(self, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """One rank's share of the dimensions of an axis: themselves without tensor parallelism."""
        if self.regime.tensor_parallel is None:
            return dims
        local = self.dimensions.split(dims, AXIS)
        self._shards[local] = dims
        return (local,)

    def unsharded(self, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """What `dims` are of the whole model."""
        return tuple(whole for dim in dims for whole in self._shards.get(dim, (dim,)))

    def padded(self, dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
        """All ranks' shares of `dims` side by side: `dims` themselves where they are even."""
        local = self.shard(dims)
        bindings = self.dimensions.bindings
        even = product(dims, bindings) == product((AXIS, *local), bindings)
        return dims if even else (AXIS, *local)

    def sequence(self) -> tuple[Dim, ...]:
        """The sequence as norms and residuals see it."""
        parallel = self.regime.tensor_parallel
        return self.shard(("s",)) if parallel and parallel.sequence else ("s",)

    def call(self, name: str, *arguments: Tensor) -> Call:
        """Run module or function `name`: its arguments live until it returns, its locals while they are bound."""
        return Call(self, name, arguments)

    @contextmanager
    def layer(self, slot: int, hidden: Tensor, *others: Tensor | None, positional: int = 1) -> Iterator[None]:
        """Everything inside belongs to layer `slot` of the stack, called with `hidden` states and `others`.

        Args:
            positional: how many of all arguments are handed over by position.
        """
        arguments = (hidden, *others)
        self.graph.entered[slot] = hidden
        self.graph.arguments[slot] = [t.storage for t in arguments if t is not None]
        self.graph.positional[slot] = sum(1 for t in arguments[:positional] if t is not None)
        outside, self.slot, self._numbers = self._numbers, slot, Counter()
        yield
        self.slot, self._numbers = None, outside

    @contextmanager
    def turn(self, slot: int) -> Iterator[None]:
        """Everything inside is the turn of layer `slot` in a loop over layers, but no part of that layer."""
        outside, self._numbers = self._numbers, Counter()
        self.slot = self._turn = slot
        yield
        self.slot = self._turn = None
        self._numbers = outside

    def capture(self, logits: Tensor) -> None:
        """Remember what the router of the layer being run returned as `logits`."""
        if self.slot is not None:
            self.router_logits[self.slot] = logits

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Everything inside is part `name` of its module (see `Op.part`)."""
        self._part = name
        yield
        self._part = ""

    def leave_model(self) -> None:
        """The model has returned: what follows (a loss outside the module) runs in the caller's frame."""
        self.graph.outside = len(self.graph.ops)

    @contextmanager
    def loss_head(self) -> Iterator[None]:
        """Everything made inside is reported as loss head."""
        outer, self._role = self._role, Role.LOSS_HEAD
        yield
        self._role = outer

    # leaves --------------------------------------------------------------------------------------------------------

    def parameter(self, name: str, *dims: Dim, dtype: DType | None = None) -> Tensor:
        """A weight: alive before and after, with a gradient."""
        tensor = self._leaf(name, dims, dtype or self.regime.weights, Role.PARAMETER)
        tensor.requires_grad = self.regime.training and not self._frozen(tensor.storage.label, self.slot)
        self.graph.parameters.append(tensor)
        if self.regime.tensor_parallel:
            self._place(tensor, name, dims)
        return tensor

    def _place(self, tensor: Tensor, name: str, dims: tuple[Dim, ...]) -> None:
        """What the whole model has of a weight, and how the gradient that autograd leaves becomes one like it."""
        style = self.style(self.module.rpartition(".")[2])
        whole = self.unsharded(dims)
        if style is Style.COLUMN or (style is Style.ROW and name == "weight"):
            whole = (*dims, AXIS)  # even shards; a dimension that is 1 here may have got lost on the way
        if whole != dims:
            tensor.storage.whole = size_of(whole, tensor.dtype.bits)
        if style is not None and self.regime.implementation in DTENSOR:
            self.graph.placements[tensor.storage] = "all_reduce.default" if style is Style.SEQUENCE else None

    def order_layer_parameters(self, *modules: str) -> None:
        """Put each layer's parameters in the order of ``model.parameters()``: that of its modules' registration.

        A module inside another may be named, too; those that are not stay in the order in which they were made.
        """
        rank = {module: i for i, module in enumerate(modules)}

        def key(tensor: Tensor) -> tuple[int, ...]:
            parts = tensor.storage.label.split(".")
            return (tensor.storage.slot or 0, *(rank[p] for p in parts if p in rank))

        parameters = self.graph.parameters
        places = [i for i, t in enumerate(parameters) if t.storage.slot is not None]
        for place, tensor in zip(places, sorted((parameters[i] for i in places), key=key), strict=True):
            parameters[place] = tensor

    def vector(self, name: str, dims: tuple[Dim, ...]) -> Tensor:
        """A one-axis weight whose axis may be several dimensions."""
        tensor = self.parameter(name, *dims)
        tensor.shape = self.squeezed((dims,))
        return tensor

    def weights(self, name: str, *axes: tuple[Dim, ...]) -> Tensor:
        """A weight whose axes may each be several dimensions."""
        tensor = self.parameter(name, *flat(axes))
        tensor.shape = self.squeezed(axes)
        return tensor

    def matrix(self, name: str, rows: tuple[Dim, ...], columns: tuple[Dim, ...]) -> Tensor:
        """A two-axis weight ``[rows, columns]`` whose axes may each be several dimensions."""
        tensor = self.parameter(name, *rows, *columns)
        tensor.shape = self.squeezed((rows, columns))
        return tensor

    def buffer(self, name: str, *dims: Dim, dtype: DType) -> Tensor:
        """A module's buffer: alive before and after, without a gradient; one, however often its module is run."""
        tensor = self._leaf(name, dims, dtype, Role.BUFFER)
        for known in self.graph.buffers:
            if (known.storage.label, known.storage.slot) == (tensor.storage.label, self.slot):
                return known
        self.graph.buffers.append(tensor)
        return tensor

    def input(self, name: str, *dims: Dim, dtype: DType) -> Tensor:
        """A tensor of the batch, made anew for each micro-batch and kept until it ends."""
        if self.regime.pipelined and self.regime.implementation not in MEGATRON:
            return self._part_of_batch(name, dims, dtype)
        tensor = self._leaf(name, dims, dtype, Role.INPUT)
        tensor.storage.persistent = self.regime.keep_inputs
        self.graph.inputs.append(tensor)
        return tensor

    def _part_of_batch(self, name: str, dims: Sequence[Dim], dtype: DType) -> Tensor:
        """One micro-batch's part of a tensor that all stages of a rank share, and that stays (``tensor_split``)."""
        storage = make_storage(name, (MICRO_BATCHES, *dims), dtype, Role.INPUT)
        storage.persistent = True
        tensor = make_tensor(storage, self.squeezed(tuple((d,) for d in dims)), dtype)
        if all(known.storage.label != name for known in self.graph.inputs):
            self.graph.inputs.append(tensor)
        return tensor

    def _leaf(self, name: str, dims: Sequence[Dim], dtype: DType, role: Role) -> Tensor:
        label = f"{self.module}.{name}" if self.module else name
        storage = make_storage(label, tuple(dims), dtype, role, self.slot)
        storage.persistent = True
        return make_tensor(storage, self.squeezed(tuple((d,) for d in dims)), dtype)

    # pipelines -----------------------------------------------------------------------------------------------------

    @contextmanager
    def pipeline_stage(self, stage: Stage, module: str) -> Iterator[None]:
        """Everything inside is one stage of a pipeline, whose modules are in `module`."""
        self.stage, self.module = stage, module
        graph = StageGraph(len(self.graph.ops))
        self.graph.stages.append(graph)
        yield
        graph.end_op = len(self.graph.ops)
        if (stage.first or graph.received) is None or (stage.last or graph.output) is None:
            raise UnsupportedError("'pp' above 1: this model is not cut into pipeline stages yet; leave it out")
        if stage.last:
            graph.loss_op, graph.loss, (graph.output, *_) = self.graph.outside, self.graph.loss, self.graph.outputs
        self.module = ""

    def receive(self, *dims: Dim) -> Tensor:
        """The hidden states, ``[b, s, h]`` unless said otherwise, that the stage before sent: a leaf with a gradient.

        With sequence parallelism they are this rank's part of the sequence, on both sides.
        """
        tensor = self._leaf("received", dims or ("b", *self.sequence(), "h"), self.regime.weights, Role.RECEIVED)
        tensor.requires_grad = self.regime.training
        self.graph.stages[-1].received = tensor
        return tensor

    def send(self, tensor: Tensor) -> None:
        """Hidden states that the next stage is sent."""
        self.graph.stages[-1].output = tensor

    # ops -----------------------------------------------------------------------------------------------------------

    def emit(
        self,
        name: str,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        *,
        saves: Sequence[Tensor] = (),
        backward: BackwardRule | None = None,
        **attributes: object,
    ) -> tuple[Tensor, ...]:
        """Record an op: it reads `inputs`, makes `outputs` (fresh, or views of inputs) and saves `saves`."""
        differentiable = backward is not None and any(tensor.requires_grad for tensor in inputs)
        slot = self.slot if self._turn is None else None
        op = Op(name, self.module, slot, tuple(inputs), tuple(outputs), part=self._part, attributes=attributes)
        op.turn = self._turn
        op.backward = backward if differentiable else None
        index = len(self.graph.ops)
        self.graph.ops.append(op)
        op.reads = _storages(inputs)
        for number, tensor in enumerate(outputs):
            if differentiable:
                tensor.producer, tensor.output_index, tensor.requires_grad = index, number, tensor.dtype.floating
            else:
                tensor.producer, tensor.output_index, tensor.requires_grad = None, 0, False
            if not tensor.is_view:
                op.births.append(tensor.storage)
        if differentiable and saves:
            op.packed = tuple(saves)
            op.saves = in_order(_storages(saves), op.reads)
            op.saves_late = any(tensor is output for tensor in saves for output in outputs)
        return op.outputs

    def squeezed(self, shape: Shape) -> Shape:
        """`shape` without the dimensions that are 1: they take no part in what can be viewed and what must be copied.

        So the graph of a batch of one differs from that of larger batches, as it does in torch.
        """
        ones = self.dimensions.ones
        if not ones:
            return shape
        known = self._squeezed.get((shape, len(ones)))
        if known is None:
            known = tuple(tuple(d for d in axis if d not in ones) for axis in shape)
            self._squeezed[shape, len(ones)] = known
        return known

    def fresh(self, name: str, shape: Shape, dtype: DType, memory: tuple[Dim, ...] | None = None) -> Tensor:
        """A new storage for the output of op `name`, to be handed to `emit`."""
        shape = self.squeezed(shape)
        label = self._numbered(f"{self.module}.{name}")
        tensor = make_tensor(make_storage(label, flat(shape), dtype, self._role, self.slot), shape, dtype)
        if memory is not None:
            (tensor.memory,) = self.squeezed((memory,))
        return tensor

    def _numbered(self, label: str) -> str:
        """`label` and how often it was used before in this layer.

        Counted by label, not by op: where the first layer casts nothing its outputs are called as those of the others.
        """
        self._numbers[label] += 1
        return f"{label}.{self._numbers[label] - 1}"

    def view(self, source: Tensor, shape: Shape, memory: tuple[Dim, ...] | None = None) -> Tensor:
        """An alias of `source` with another shape, to be handed to `emit`."""
        shape, (order,) = self.squeezed(shape), self.squeezed((memory or source.memory,))
        return Tensor(source.storage, shape, order, source.dtype, is_view=True, dense=source.dense)

    def embedded(self, tensor: Tensor) -> Tensor:
        """What the module that embeds the tokens returns, made a leaf whose gradient lasts where a hook asks for one.

        Source: transformers/modeling_utils.py `enable_input_require_grads`, which checkpointing of layers calls.
        """
        if self.regime.embeddings_require_grad and not tensor.requires_grad:
            tensor.requires_grad = True
            self.graph.held = (*self.graph.held, tensor)
        return tensor

    def drop(self, tensor: Tensor) -> None:
        """A Python reference to `tensor` ends after the op that ran last."""
        ops = self.graph.ops
        if ops and not tensor.storage.persistent and tensor.storage.role is not Role.INPUT:
            holds = ops[-1].holds
            if tensor.storage not in holds:
                holds.append(tensor.storage)

    # autocast ------------------------------------------------------------------------------------------------------

    def cached_cast(self, tensor: Tensor) -> Tensor | None:
        """The low-precision copy that autocast made of this weight before, if any."""
        return self._casts.get(tensor)

    def remember_cast(self, tensor: Tensor, cast: Tensor) -> None:
        """Autocast keeps one copy of each weight until it ends (torch aten/src/ATen/autocast_mode.cpp)."""
        self._casts[tensor] = cast

    def end_autocast(self) -> None:
        """Leave ``torch.autocast``: the cache of weight copies is dropped."""
        for cast in self._casts.values():
            self.drop(cast)
        self._casts.clear()


def _storages(tensors: Sequence[Tensor]) -> list[Storage]:
    """The storages of `tensors`, each once."""
    if len(tensors) == 1:
        return [tensors[0].storage]
    return list(dict.fromkeys([tensor.storage for tensor in tensors]))
