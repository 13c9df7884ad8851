"""A weight as an optimizer sees it."""

from __future__ import annotations

import attrs

from hardware.dtypes import DType
from simulator.graph import Shape, Storage, flat
from simulator.sizes import Dim


@attrs.frozen(eq=False)
class Parameter:
    """A trainable weight with its gradient; `shape` is that of the weight, an axis may be several dimensions."""

    storage: Storage
    gradient: Storage
    shape: Shape
    distributed: bool = False
    """Whether it is a DTensor of tensor parallelism."""
    redistribution: str | None = None
    """Kernel that brings the gradient to the weight's placement, where it has another one."""
    group: int = 0
    """Number of the optimizer's parameter group that it is in."""

    @property
    def dims(self) -> tuple[Dim, ...]:
        """All dimensions of the weight."""
        return flat(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns, or is a stack of matrices (Adafactor factors the last two axes)."""
        return len(self.shape) >= 2

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix of a layer: no embedding, head, norm, bias or stack of experts."""
        return len(self.shape) == 2 and self.storage.slot is not None

    @property
    def rows(self) -> tuple[Dim, ...]:
        """Dimensions of one number per row."""
        return flat(self.shape[:-1])

    @property
    def columns(self) -> tuple[Dim, ...]:
        """Dimensions of one number per column."""
        return flat((*self.shape[:-2], self.shape[-1]))

    @property
    def stack(self) -> tuple[Dim, ...]:
        """Dimensions of one number per matrix: none, unless it is a stack of them."""
        return flat(self.shape[:-2])

    @property
    def dtype(self) -> DType:
        """Element type of the weight."""
        return self.storage.dtype
