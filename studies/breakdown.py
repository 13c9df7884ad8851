"""What is alive at a peak, by place: the modules before the layers, runs of equal layers, the modules after them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import attrs

from simulator.graph import ForwardGraph
from simulator.timeline import Live

#: A module outside the layers with less than this share of the peak joins the others of its kind.
NAMED = 0.005
ELSEWHERE = "elsewhere outside the layers"
TOP_LEVEL = "the model itself"


@attrs.frozen
class LayerGroup:
    """Bytes of some consecutive layers that hold the same each, or of a module outside the layers."""

    name: str
    nbytes_each: int
    first: int | None = None
    last: int | None = None

    @property
    def count(self) -> int:
        """How many layers."""
        return 1 if self.first is None or self.last is None else self.last - self.first + 1

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.count * self.nbytes_each


def by_place(live: Sequence[Live], graph: ForwardGraph) -> list[LayerGroup]:
    """Bytes by module outside the layers and by layer, in the order in which forward meets them."""
    modules = _modules(graph)
    layers: dict[int, int] = {}
    outside = dict.fromkeys((*modules, ELSEWHERE), 0)
    for storage in live:
        label, layer = storage.identity
        if layer is None:
            outside[_owner(label, modules)] += storage.nbytes
        else:
            layers[layer] = layers.get(layer, 0) + storage.nbytes
    total = sum(outside.values()) + sum(layers.values())
    named = {m: LayerGroup(m or TOP_LEVEL, outside[m]) for m in modules if outside[m] >= NAMED * total}
    rest = sum(outside.values()) - sum(group.nbytes for group in named.values())
    before = [group for module, group in named.items() if modules[module]]
    after = [group for module, group in named.items() if not modules[module]]
    elsewhere = [LayerGroup(ELSEWHERE, rest)] if rest else []
    return [*before, *_runs(sorted(layers.items())), *after, *elsewhere]


def _modules(graph: ForwardGraph) -> dict[str, bool]:
    """Every module outside the layers that owns a weight or runs an op, and whether it comes before the layers."""
    weights = [(tensor.storage.label.rpartition(".")[0], tensor.storage.slot) for tensor in graph.parameters]
    found: dict[str, bool] = {}
    for members in (weights, [(op.module, op.slot) for op in graph.ops]):
        before = True
        for module, slot in members:
            before = before and slot is None
            if slot is None:
                found.setdefault(module, before)
    return found


def _owner(label: str, modules: Iterable[str]) -> str:
    """The innermost module that the label of a storage begins with."""
    return max((m for m in modules if label.startswith(f"{m}.")), key=len, default=ELSEWHERE)


def _runs(layers: Iterable[tuple[int, int]]) -> list[LayerGroup]:
    """Neighbours that hold the same bytes each, together."""
    groups: list[LayerGroup] = []
    for layer, nbytes in layers:
        if groups and groups[-1].nbytes_each == nbytes and groups[-1].last == layer - 1:
            first = groups.pop().first
            groups.append(LayerGroup(f"layers {first}-{layer}", nbytes, first, layer))
        else:
            groups.append(LayerGroup(f"layer {layer}", nbytes, layer, layer))
    return groups
