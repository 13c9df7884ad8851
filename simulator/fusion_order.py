"""The order of backward's nodes: the engine's, and inside compiled layers that in which fused kernels run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from simulator.graph import ForwardGraph


def kernel_order(graph: ForwardGraph, last: int) -> Iterator[int]:
    """Indices of the ops whose backward runs, from op `last` on: the last op first, as torch's engine goes.

    In a compiled layer a fused op runs as soon as all that use its results have run, because Inductor makes one
    kernel of it and the one before it (torch/_inductor/scheduler.py `fuse_nodes`).
    """
    for _, block in groupby(range(last, -1, -1), key=lambda index: graph.ops[index].slot):
        indices = list(block)
        yield from _fused_first(graph, indices) if any(graph.ops[i].fused for i in indices) else indices


def _fused_first(graph: ForwardGraph, indices: list[int]) -> Iterator[int]:
    waiting = dict.fromkeys(indices, 0)
    for index in indices:
        for maker in _makers(graph, index):
            if maker in waiting:
                waiting[maker] += 1
    ready = [index for index in indices if not waiting[index]]
    while ready:
        index = max(ready, key=lambda i: (graph.ops[i].fused, i))
        ready.remove(index)
        yield index
        for maker in _makers(graph, index):
            if maker in waiting:
                waiting[maker] -= 1
                if not waiting[maker]:
                    ready.append(maker)


def _makers(graph: ForwardGraph, index: int) -> list[int]:
    return [t.producer for t in graph.ops[index].inputs if t.producer is not None]
