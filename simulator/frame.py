"""The Python names that keep tensors alive while a forward pass is traced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simulator.graph import Tensor

if TYPE_CHECKING:
    from simulator.trace import Trace


class Frame:
    """The locals of one Python function: a name keeps its tensor until it is bound anew or the frame ends."""

    def __init__(self, trace: Trace, arguments: Sequence[Tensor]) -> None:
        self._trace = trace
        self._arguments = list(arguments)
        self._locals: dict[str, Tensor] = {}

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Bind local `name` to `tensor`, dropping what it held; returns `tensor`."""
        old = self._locals.get(name)
        self._locals[name] = tensor
        if old is not None:
            self._trace.drop(old)
        return tensor

    def held(self, name: str) -> Tensor:
        """What local `name` is bound to."""
        return self._locals[name]

    def keep(self, tensor: Tensor) -> None:
        """Keep `tensor` until the frame ends: a node of autograd that a local leads to has saved it."""
        self._arguments.append(tensor)

    def close(self) -> None:
        """Leave the function: every local and argument is dropped."""
        for tensor in (*self._arguments, *self._locals.values()):
            self._trace.drop(tensor)


class Call:
    """The body of a ``with`` that is one Python function: entered with a frame, which is closed at the end."""

    def __init__(self, trace: Trace, name: str, arguments: Sequence[Tensor]) -> None:
        self._trace = trace
        self._name = name
        self._frame = Frame(trace, arguments)
        self._outer = trace.module
        self._first = len(trace.graph.ops)

    def __enter__(self) -> Frame:
        if self._name:
            self._trace.module = f"{self._outer}.{self._name}" if self._outer else self._name
        return self._frame

    def __exit__(self, *_: object) -> None:
        trace, first = self._trace, self._first
        if self._name and first == len(trace.graph.ops):
            trace.graph.idle.setdefault(first, []).append((trace.module, trace.slot))
        trace.module = self._outer
        self._frame.close()
