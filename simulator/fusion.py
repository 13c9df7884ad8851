"""Layers as torch.compile runs them: fused kernels, and a minimum cut that decides what is saved (an approximation).

The cut follows AOTAutograd's partitioner (torch/_functorch/partitioners.py `solve_min_cut`): what a matrix product or
attention needs in backward is saved, and everything between is recomputed from the fewest bytes. A fused chain of
elementwise ops and reductions allocates nothing but what leaves it. Left out are the partitioner's weight on distance,
the chains that Inductor cuts in two, and the gradients of norms' weights that it puts off to the end of backward.
"""

from __future__ import annotations

from collections.abc import Iterable

from hardware.dtypes import COMPLEX64, FP32
from hardware.errors import UnsupportedError
from simulator.graph import ForwardGraph, Op, Storage, flat, make_storage
from simulator.roles import Role
from simulator.sizes import Bindings, Size
from simulator.trace import Trace

#: What Inductor makes into kernels of its own; all else is a kernel of a library (torch/_inductor/lowering.py).
FUSIBLE = frozenset(
    f"{name}.{overload}"
    for overload, names in {
        "default": "_fused_rms_norm _softmax _to_copy _unsafe_view abs cat clone exp exp2 expand gelu mean "
        "native_layer_norm neg reciprocal relu rsqrt sigmoid silu split_with_sizes tanh view",
        "dim": "mean",
        "int": "select transpose",
        "dim_IntList": "sum",
        "Scalar": "add div mul rsub",
        "Tensor": "add div mul slice split sub",
        "Tensor_Scalar": "pow",
    }.items()
    for name in names.split()
)
_REDUCTIONS = ("mean.default", "mean.dim", "sum.dim_IntList")
#: A reduction's result is saved where it is this much smaller than what it reduces (`solve_min_cut` `should_ban`).
_MUCH_SMALLER = 4
#: What is not in memory anyway counts this much against saving it (`get_node_weight`).
_NOT_MATERIALISED = 2
#: The size of what is never in memory.
NOTHING = Size((0,), 8)
_SOURCE, _SINK = "source", "sink"


def compile_layers(trace: Trace) -> None:
    """Rewrite what the layers of the graph that was just traced read, save and allocate.

    Raises:
        UnsupportedError: layers with collectives, or with linear functions of their own.
    """
    graph, regime = trace.graph, trace.regime
    if regime.tensor_parallel or regime.float8 or regime.memory_efficient_linear:
        raise UnsupportedError("'compile' with tensor parallelism, float8 or ZeRO-3 is not modelled: leave one out")
    by_slot: dict[int, list[Op]] = {}
    for op in graph.ops:
        if op.slot is not None:
            by_slot.setdefault(op.slot, []).append(op)
    for ops in by_slot.values():
        _Layer(graph, ops, trace.dimensions.bindings).compile()


class _Layer:
    """The ops of one layer, each compiled region being one layer."""

    def __init__(self, graph: ForwardGraph, ops: list[Op], bindings: Bindings) -> None:
        self.graph, self.ops, self.bindings = graph, ops, bindings
        for op in ops:
            op.fused = op.name in FUSIBLE and all(tensor.dtype != COMPLEX64 for tensor in op.outputs)
        self._keep_statistics()
        self.uses = {op: graph.uses(op) for op in ops}
        self.maker = {storage: op for op in ops for storage in graph.births(op)}
        self.materialised = {s for s, op in self.maker.items() if not op.fused}
        self.materialised |= {s for op in ops if not op.fused for s in self.uses[op].reads}
        self.hard = {s for op in ops if op.backward and not op.fused for s in self.uses[op].saves}

    def compile(self) -> None:
        """Decide what is saved, then what is in memory at all."""
        saved = self._cut()
        self._save(saved)
        self.materialised |= saved | {s for s in self.maker if self._leaves(s)}
        for op in self.ops:
            self._read_through(op)
        for storage in self.maker.keys() - self.materialised:
            storage.size = NOTHING
        for op in self.ops:
            if op.fused:
                self._write_in_place(op)

    def _keep_statistics(self) -> None:
        """A fused softmax can be recomputed from two numbers per row (torch/_decomp `_softmax`: amax and sum)."""
        for op in self.ops:
            if op.fused and op.name == "_softmax.default" and op.backward:
                rows = flat(op.outputs[0].shape[:-1])
                for name in ("amax", "sum"):
                    label = f"{op.module}.{name}.{self.ops.index(op)}"
                    self.graph.edges.add_edge(op, make_storage(label, rows, FP32, Role.ACTIVATION, op.slot))

    # what is saved -------------------------------------------------------------------------------------------------

    def _parents(self, storage: Storage) -> list[Storage]:
        """What `storage` can be recomputed from; nothing where it has to be saved itself."""
        op = self.maker.get(storage)
        if op is None or not op.fused or storage in self.hard or self._is_small(storage):
            return []
        return self._inputs(storage)

    def _inputs(self, storage: Storage) -> list[Storage]:
        """What the op that makes `storage` reads, and the statistics that it makes on its way."""
        op = self.maker[storage]
        statistics = [s for s in self.graph.births(op) if s is not storage and self._is_small(s)]
        return [*self.uses[op].reads, *statistics]

    def _is_small(self, storage: Storage) -> bool:
        """Whether it is the result of a reduction, or a statistic beside one."""
        op = self.maker.get(storage)
        if op is None or not op.fused or (op.name not in _REDUCTIONS and len(self.graph.births(op)) == 1):
            return False
        read = sum(self._nbytes(each) for each in self.uses[op].reads)
        return self._nbytes(storage) * _MUCH_SMALLER < read

    def _nbytes(self, storage: Storage) -> int:
        return int(storage.size.nbytes(self.bindings))

    def _weight(self, storage: Storage) -> int:
        if storage.persistent:
            return 0
        inside = storage in self.maker and storage not in self.materialised
        return self._nbytes(storage) * (_NOT_MATERIALISED if inside else 1)

    def _cut(self) -> set[Storage]:
        """The storages that separate what forward is given from what backward needs, by the fewest bytes."""
        import networkx as nx

        flow: nx.DiGraph[object] = nx.DiGraph()
        pending = [s for op in self.ops if op.backward for s in self.uses[op].saves]
        numbers: dict[Storage, int] = {}
        for storage in pending:
            flow.add_edge((self._number(numbers, storage), "out"), _SINK)
        while pending:
            storage = pending.pop()
            number = self._number(numbers, storage)
            if (number, "in") in flow:
                continue
            flow.add_edge((number, "in"), (number, "out"), capacity=self._weight(storage))
            parents = self._parents(storage)
            for parent in parents:
                flow.add_edge((self._number(numbers, parent), "out"), (number, "in"))
            if not parents:
                flow.add_edge(_SOURCE, (number, "in"))
            pending += parents
        if _SOURCE not in flow:
            return set()
        reached = nx.minimum_cut(flow, _SOURCE, _SINK)[1][0]
        return {s for s, n in numbers.items() if (n, "in") in reached and (n, "out") not in reached}

    @staticmethod
    def _number(numbers: dict[Storage, int], storage: Storage) -> int:
        return numbers.setdefault(storage, len(numbers))

    def _save(self, saved: set[Storage]) -> None:
        """Each op saves what its own saved tensors are recomputed from."""
        for op in self.ops:
            needed = self._roots(self.uses[op].saves, saved)
            for storage in self.uses[op].saves:
                self._drop_edge(storage, op, "saves")
            for storage in needed if op.backward else ():
                self.graph.edges.add_edge(storage, op, saves=True)
            op.saves_late = bool(needed)

    def _roots(self, storages: Iterable[Storage], kept: set[Storage]) -> list[Storage]:
        """What of `kept`, or of what the layer did not make, `storages` are computed from."""
        found: dict[Storage, None] = {}
        pending, seen = list(storages), set()
        while pending:
            storage = pending.pop()
            if storage in seen:
                continue
            seen.add(storage)
            if storage in kept or storage not in self.maker:
                found[storage] = None
            else:
                pending += self._inputs(storage)
        return list(found)

    # what is in memory ---------------------------------------------------------------------------------------------

    def _leaves(self, storage: Storage) -> bool:
        """Whether something outside the layer reads, saves or holds it."""
        return any(op not in self.uses for op in self.graph.edges.succ[storage])

    def _read_through(self, op: Op) -> None:
        """A kernel reads what its fused inputs are computed from; no Python name keeps anything inside the layer."""
        through = self._roots([s for s in self.uses[op].reads if s in self.maker], self.materialised)
        for storage in through:
            self.graph.edges.add_edge(storage, op, reads=True)
        for storage in self.uses[op].holds:
            if storage in self.maker and not storage.cached_by_autocast:
                self._drop_edge(storage, op, "holds")

    def _write_in_place(self, op: Op) -> None:
        """A kernel's result takes the place of an input as large that nothing needs afterwards."""
        edges = self.graph.edges
        for result in [s for s in self.graph.births(op) if s in self.materialised]:
            for source in self.graph.uses(op).reads:
                if source.size == result.size and source.dtype == result.dtype and self._ends_at(source, op):
                    edges.add_edge(next(iter(edges.pred[source])), result)
                    edges.remove_edge(op, result)
                    for reader in list(edges.succ[source]):
                        if reader is not op:
                            edges.add_edge(result, reader, reads=True)
                    edges.remove_node(source)
                    break

    def _ends_at(self, source: Storage, op: Op) -> bool:
        """Whether `op` is the last that needs `source`, which this layer made."""
        place = {each: index for index, each in enumerate(self.ops)}
        return source in self.maker and all(
            place.get(reader, len(place)) <= place[op] and set(edge) == {"reads"}
            for reader, edge in self.graph.edges.succ[source].items()
        )

    def _drop_edge(self, storage: Storage, op: Op, why: str) -> None:
        edge = self.graph.edges.edges[storage, op]
        edge.pop(why, None)
        if not edge:
            self.graph.edges.remove_edge(storage, op)
