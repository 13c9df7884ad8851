"""What layers hand to their neighbours, where a built layer stands for others of its kind here and there.

Such a layer may run anywhere, because all that passes between layers is alike: hidden states one way, gradients the
other. Both get names that do not tell which kind of layer made them. What is otherwise is found here and said with
`Unlike`: fewer layers must stand for others then.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import attrs

from simulator.graph import ForwardGraph, Storage, Tensor
from simulator.layout import Layout, Sharing
from simulator.recorder import Step
from simulator.roles import Phase

#: The slot of the hidden states that the first layer is given, where that one stands for others.
BEFORE = -1


class Unlike(Exception):  # noqa: N818 - no error of anyone's: another layout is tried
    """Layers of one kind are not alike where they are: one cannot stand for so many others.

    Args:
        so_far: for which it may, if for any.
    """

    def __init__(self, so_far: Sharing = Sharing.TURNS) -> None:
        super().__init__(so_far)
        self.so_far = so_far


class HandOver:
    """Finds and names what the built layers of a layout hand on.

    Attributes:
        given: the hidden states that the first layer is given, where that one stands for others.

    Raises:
        Unlike: hidden states that differ between layers, or loops over layers outside of them.
    """

    def __init__(self, layout: Layout, graph: ForwardGraph) -> None:
        self._repeats = [place.repeats for place in layout.places]
        self._gradients: dict[int, list[Storage]] = {slot: [] for slot in range(1, len(self._repeats))}
        entered = [graph.entered[slot] for slot in range(len(self._repeats))]
        self.given = entered[0].storage if self._repeats[0] > 1 else None
        handed = [*(entered if self.given else entered[1:]), self._left(graph)]
        if any(op.turn is not None for op in graph.ops):
            raise Unlike
        if len(set(map(_form, handed))) > 1:
            raise Unlike(Sharing.REST if self.given else Sharing.TURNS)
        for tensor in handed:
            tensor.storage.handed_on = "hidden states"
        if self.given:
            self.given.slot = BEFORE

    def _left(self, graph: ForwardGraph) -> Tensor:
        """The hidden states that the last layer returns: what is read of it first behind the stack."""
        last = len(self._repeats) - 1
        end = next(index for index in reversed(range(len(graph.ops))) if graph.ops[index].slot == last)
        read = (tensor for op in graph.ops[end + 1 :] for tensor in op.inputs if tensor.storage.slot == last)
        return next(read)

    def see(self, steps: Sequence[Step]) -> None:
        """Name what `steps` free of other layers' storages.

        Raises:
            Unlike: a layer frees what is not handed from neighbour to neighbour.
        """
        for step in steps:
            for storage in step.deaths:
                if step.slot is None:
                    self._check_outside(storage, step.phase)
                elif storage.slot != step.slot:
                    if step.phase is Phase.OPTIMIZER:  # as large as that layer's last weight, which tells kinds apart
                        raise Unlike
                    self._name(storage, step.slot)

    def _check_outside(self, storage: Storage, phase: Phase) -> None:
        """The gradient of what the first layer is given goes outside: that of other layers' would go in a layer."""
        own = storage.slot == 0 and phase is Phase.BACKWARD and not storage.cached_by_autocast
        if own and self._repeats[0] > 1 and not storage.handed_on:
            raise Unlike(Sharing.REST)

    def _name(self, storage: Storage, slot: int) -> None:
        """Layer `slot` frees the `storage` of another."""
        if storage.slot == slot + 1 and not storage.handed_on:
            known = self._gradients[storage.slot]
            storage.handed_on = f"gradient {len(known)}"
            known.append(storage)
        if storage.slot is None:
            if slot and self._repeats[slot] > 1:  # what they share layers free with the first, after all others
                raise Unlike(Sharing.LATER)
        elif not storage.handed_on or abs(storage.slot - slot) > 1:
            raise Unlike

    def outlives(self, steps: Iterable[Step]) -> bool:
        """Whether the model's own frame keeps beyond the stack, in `steps`, what the first layer is given."""
        return any(step.slot is None and self.given in step.deaths for step in steps)

    def later(self, steps: Sequence[Step], *, outlives: bool) -> Sequence[Step]:
        """The `steps` of the first layer as they are in those that it stands for.

        They do not free what all layers share, and free on return what they are given, where the first does not
        because it `outlives` the stack.
        """
        assert self.given is not None
        if not outlives and all(storage.slot is not None for step in steps for storage in step.deaths):
            return steps
        own = [attrs.evolve(step, deaths=[s for s in step.deaths if s.slot is not None]) for step in steps]
        if outlives:
            own[-1].deaths.append(self.given)
        return own

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
