"""Liger-Kernel (Hsu et al., arXiv:2410.10989): which of its fused kernels a model runs in place of PyTorch's ops.

Names, defaults and families are those of src/liger_kernel/transformers/monkey_patch.py, version 0.8.2 (ead96b618).
A model is patched as transformers' Trainer does it (``use_liger_kernel``): once it is built, module by module.
"""

from __future__ import annotations

from enum import Enum

import attrs

from hardware.errors import UnsupportedError, UsageError, unknown_name

#: Streaming multiprocessors of an H100 SXM5 (NVIDIA H100 Tensor Core GPU Architecture, V1.04, table 2).
H100_MULTIPROCESSORS = 132
LARGEST_MULTIPROCESSORS = 2**16

_LAYER = ("rope", "rms_norm", "swiglu")
_GEMMA = ("rope", "rms_norm", "geglu")
_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")
#: Families whose `apply_liger_kernel_to_...` is modelled -> what it patches.
FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "olmo2", "phi3", "smollm3", "exaone4"), (*_LAYER, *_LOSSES)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), (*_GEMMA, *_LOSSES)),
    **dict.fromkeys(("mixtral", "qwen3_moe"), (*_LAYER, *_LOSSES)),
    "mistral": (*_LAYER, "fused_linear_cross_entropy"),
    "nemotron": ("relu_squared", "fused_linear_cross_entropy"),
    "granite": (*_LAYER, "cross_entropy"),
}
#: Switches that a family's function has and that patch nothing there -> why.
_WITHOUT_EFFECT = {
    ("mistral", "cross_entropy"): "it patches a name that transformers does not use since 4.46",
    ("nemotron", "cross_entropy"): "it patches a name that transformers does not use since 4.46",
    ("granite", "fused_linear_cross_entropy"): "Liger has none for logits that are scaled",
}


class NormPatch(Enum):
    """What Liger makes of one norm of a model."""

    IN_PLACE = "the input's gradient overwrites the output's"
    APART = "the input's gradient is a tensor of its own, because another reader needs the output's"
    NONE = "left as it is"


def _true_or_false(_: Liger, attribute: attrs.Attribute[bool], value: object) -> None:
    if not isinstance(value, bool):
        raise UsageError(f"'{attribute.name}' must be True or False: {value!r}")


def _switch() -> bool:
    switch: bool = attrs.field(default=False, validator=_true_or_false)
    return switch


@attrs.frozen(kw_only=True)
class Liger:
    """The kernels of Liger that are switched on; every field changes memory.

    Raises:
        UsageError: both losses at once, or no number of multiprocessors.
    """

    rope: bool = _switch()
    """Rotary positions: turns queries and keys in place."""
    rms_norm: bool = _switch()
    """Root mean square norm: saves its input and one statistic per token."""
    swiglu: bool = _switch()
    """``silu(gate) * up``: saves the factors only."""
    geglu: bool = _switch()
    """``gelu(gate) * up``, the same way."""
    relu_squared: bool = _switch()
    """Squared ReLU: saves its input only."""
    cross_entropy: bool = _switch()
    """The gradient overwrites the logits in forward."""
    fused_linear_cross_entropy: bool = _switch()
    """Language head and cross-entropy, some tokens at a time: no logits are kept."""
    multiprocessors: int = H100_MULTIPROCESSORS
    """Of the GPU: the backward of the norm sums its weight's gradient in one fp32 row for each."""

    def __attrs_post_init__(self) -> None:
        count = self.multiprocessors
        if type(count) is not int or not 1 <= count <= LARGEST_MULTIPROCESSORS:
            raise UsageError(f"'multiprocessors' must be a whole number from 1 to {LARGEST_MULTIPROCESSORS}: {count!r}")
        if self.cross_entropy and self.fused_linear_cross_entropy:
            raise UsageError("'liger' has one loss: cross_entropy or fused_linear_cross_entropy, not both")

    @property
    def kernels(self) -> tuple[str, ...]:
        """Names of what is switched on."""
        return tuple(name for name in KERNELS if getattr(self, name))


#: Every kernel that can be switched on.
KERNELS = tuple(field.name for field in attrs.fields(Liger) if field.name != "multiprocessors")


def liger(kernels: tuple[str, ...], *, multiprocessors: int = H100_MULTIPROCESSORS) -> Liger:
    """Exactly these `kernels` switched on.

    Raises:
        UsageError: a name that is no kernel's.
    """
    for name in kernels:
        if name not in KERNELS:
            raise unknown_name("Liger kernel", name, KERNELS)
    return attrs.evolve(Liger(multiprocessors=multiprocessors), **dict.fromkeys(kernels, True))


def default_kernels(family: str) -> tuple[str, ...]:
    """What `apply_liger_kernel_to_...` patches unless told otherwise: all it can, and one loss.

    Raises:
        UnsupportedError: a family that Liger does not patch, or not in a way that is modelled.
    """
    known = _kernels_of(family)
    fused = "fused_linear_cross_entropy" in known
    return tuple(name for name in known if not (fused and name == "cross_entropy"))


def check_family(chosen: Liger, family: str) -> None:
    """Refuse kernels that Liger does not have for a family.

    Raises:
        UnsupportedError: as described, with the kernels that it has.
    """
    for name in chosen.kernels:
        known = _kernels_of(family)
        if name not in known:
            reason = _WITHOUT_EFFECT.get((family, name), "Liger does not patch it there")
            raise UnsupportedError(f"'liger' {name} is not for {family}: {reason}; leave it out ({', '.join(known)})")


def _kernels_of(family: str) -> tuple[str, ...]:
    if family not in FAMILIES:
        raise UnsupportedError(f"'liger' is modelled for {', '.join(sorted(FAMILIES))}, not for {family}: leave it out")
    return FAMILIES[family]
