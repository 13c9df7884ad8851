"""What layers hand to their neighbours, where a built layer stands for others of its kind here and there.

Such a layer may run anywhere, because all that passes between layers is alike: hidden states one way, gradients the
other. Both get names that do not tell which kind of layer made them. What is otherwise is found here and said with
`Unlike`: fewer layers must stand for others then.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from simulator.graph import ForwardGraph, Storage, Tensor
from simulator.layout import Layout
from simulator.recorder import Step


class Unlike(Exception):  # noqa: N818 - no error of anyone's: another layout is tried
    """Layers of one kind are not alike where they are: one cannot stand for the others."""


class HandOver:
    """Finds and names what the built layers of a layout hand on.

    Raises:
        Unlike: hidden states that differ between layers, or loops over layers outside of them.
    """

    def __init__(self, layout: Layout, graph: ForwardGraph) -> None:
        self._repeats = [place.repeats for place in layout.places]
        self._gradients: dict[int, list[Storage]] = {slot: [] for slot in range(1, len(self._repeats))}
        entered = [graph.entered[slot] for slot in sorted(graph.entered)][1:]
        left = self._left(graph)
        if len(set(map(_form, entered))) > 1 or any(op.turn is not None for op in graph.ops):
            raise Unlike
        if entered and [_column(entered[0].storage)] != [_column(storage) for storage in left]:
            raise Unlike
        for storage in (*(tensor.storage for tensor in entered), *left):
            storage.handed_on = "hidden states"

    def _left(self, graph: ForwardGraph) -> list[Storage]:
        """The hidden states that the last layer returns: what is read of them by the op that follows the stack."""
        last = len(self._repeats) - 1
        end = next(index for index in reversed(range(len(graph.ops))) if graph.ops[index].slot == last)
        return [storage for storage in graph.ops[end + 1].reads if storage.slot == last]

    def see(self, steps: Sequence[Step]) -> None:
        """Name what `steps` free of other layers' storages.

        Raises:
            Unlike: a layer that stands for others frees what is not handed from neighbour to neighbour.
        """
        for step in steps:
            if step.slot is None:
                continue
            for storage in step.deaths:
                if storage.slot != step.slot:
                    self._handed(storage, step.slot)

    def _handed(self, storage: Storage, slot: int) -> None:
        """Layer `slot` frees the `storage` of another."""
        if storage.slot == slot + 1 and not storage.handed_on:
            known = self._gradients[storage.slot]
            storage.handed_on = f"gradient {len(known)}"
            known.append(storage)
        near = storage.slot is not None and abs(storage.slot - slot) == 1 and storage.handed_on
        if not near and self._repeats[slot] > 1:
            raise Unlike

    def check(self) -> None:
        """All layers must have handed on the same.

        Raises:
            Unlike: they did not.
        """
        if len({tuple(map(_column, given)) for given in self._gradients.values()}) > 1:
            raise Unlike


def _form(tensor: Tensor) -> Hashable:
    view = (tensor.is_view, tensor.dense, tensor.requires_grad)
    return (_column(tensor.storage), tensor.shape, tensor.memory, tensor.dtype, *view)


def _column(storage: Storage) -> Hashable:
    return storage.role, storage.size
