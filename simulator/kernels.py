"""Which kernels a model's modules run: the framework's own ops, or fused ones that a library patches in."""

from __future__ import annotations

import attrs

from hardware.errors import UsageError, unknown_name

#: What each part of a model may run: eager PyTorch, or Liger-Kernel (commit ead96b618).
LIBRARIES = ("eager", "liger")
#: Streaming multiprocessors of an H100 SXM5 (NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 2).
H100_MULTIPROCESSORS = 132
LARGEST_MULTIPROCESSORS = 2**16


def _known(_: Kernels, attribute: attrs.Attribute[str], value: object) -> None:
    if value not in LIBRARIES:
        raise unknown_name(f"kernels of {attribute.name}", value, LIBRARIES)


@attrs.frozen(kw_only=True)
class Kernels:
    """The library whose kernels each part of a model runs; every field changes memory.

    Raises:
        UsageError: a library that no table holds, or no number of multiprocessors.
    """

    norm: str = attrs.field(default="eager", validator=_known)
    rotary: str = attrs.field(default="eager", validator=_known)
    swiglu: str = attrs.field(default="eager", validator=_known)
    loss: str = attrs.field(default="eager", validator=_known)
    """``liger`` fuses the language head with the cross-entropy: no logits are kept."""
    multiprocessors: int = H100_MULTIPROCESSORS
    """Of the GPU: Liger's norm sums its weight's gradient in one fp32 row for each."""

    def __attrs_post_init__(self) -> None:
        count = self.multiprocessors
        if type(count) is not int or not 1 <= count <= LARGEST_MULTIPROCESSORS:
            raise UsageError(f"'multiprocessors' must be a whole number from 1 to {LARGEST_MULTIPROCESSORS}: {count!r}")

    @property
    def replaced(self) -> tuple[str, ...]:
        """The parts that do not run the framework's own ops."""
        return tuple(part for part in PARTS if getattr(self, part) != "eager")


#: Parts of a model whose kernels may be replaced.
PARTS = tuple(field.name for field in attrs.fields(Kernels) if field.name != "multiprocessors")
#: All that `apply_liger_kernel_to_llama` patches unless told otherwise.
LIGER = Kernels(norm="liger", rotary="liger", swiglu="liger", loss="liger")
