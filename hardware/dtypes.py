"""Element types by their width in bits, so that 4-bit and boolean storages are exact too."""

from __future__ import annotations

import attrs

from hardware.errors import unknown_name


@attrs.frozen
class DType:
    """An element type: `name` as torch spells it, `bits` per element, and whether autograd can flow through it."""

    name: str
    bits: int
    floating: bool = True

    def __str__(self) -> str:
        return self.name


FP64 = DType("float64", 64)
FP32 = DType("float32", 32)
BF16 = DType("bfloat16", 16)
FP16 = DType("float16", 16)
FP8_E4M3 = DType("float8_e4m3fn", 8)
FP8_E5M2 = DType("float8_e5m2", 8)
COMPLEX64 = DType("complex64", 64)
INT64 = DType("int64", 64, floating=False)
INT8 = DType("int8", 8, floating=False)
INT32 = DType("int32", 32, floating=False)
INT16 = DType("int16", 16, floating=False)
UINT64 = DType("uint64", 64, floating=False)
UINT8 = DType("uint8", 8, floating=False)
BOOL = DType("bool", 8, floating=False)

#: The short names people type, and torch's own.
TRAINING_DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16}
_BY_NAME = TRAINING_DTYPES | {d.name: d for d in (FP64, FP32, BF16, FP16, INT64, INT32, INT16, UINT64, UINT8, BOOL)}


def dtype(name: str) -> DType:
    """The dtype called `name` (``bf16`` or ``bfloat16``); `UsageError` with suggestions otherwise."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise unknown_name("dtype", name, _BY_NAME) from None
