"""Sizes as data: a storage names its dimensions, and one evaluator turns names into bytes.

The same definition prices an int (one estimate), a numpy array (a sweep) and a sympy
expression (a formula), because it only uses ``* + - //``, `minimum` and `maximum`.
All arithmetic on sizes lives in this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import attrs

if TYPE_CHECKING:
    import sympy

#: One factor of a size: a dimension's name or a constant.
Dim: TypeAlias = str | int
#: What a dimension may be bound to: int, numpy integer array, or sympy expression.
Value: TypeAlias = Any
Bindings: TypeAlias = Mapping[str, Value]

#: The CUDA caching allocator hands out multiples of this many bytes
#: (torch c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize).
ALLOCATION_GRANULARITY = 512


def minimum(left: Value, right: Value) -> Value:
    """The smaller of two values in any of the three number systems."""
    return _pick(left, right, "Min", "minimum", min)


def maximum(left: Value, right: Value) -> Value:
    """The larger of two values in any of the three number systems."""
    return _pick(left, right, "Max", "maximum", max)


def ceil_div(value: Value, divisor: Value) -> Value:
    """`value` divided by `divisor`, rounded up, by floor division alone."""
    return -(-value // divisor)


def packed(elements: Value, bits: int) -> Value:
    """Bytes of so many elements; widths of whole bytes do not pass through bits, which 64 of them might not hold."""
    return elements * (bits // 8) if bits % 8 == 0 else ceil_div(elements * bits, 8)


def round_up(value: Value, multiple: Value) -> Value:
    """The smallest multiple of `multiple` that is at least `value`."""
    return ceil_div(value, multiple) * multiple


def product(dims: Iterable[Dim], bindings: Bindings) -> Value:
    """The bound dimensions multiplied."""
    count: Value = 1
    for dim in dims:
        count = count * (dim if isinstance(dim, int) else bindings[dim])
    return count


def _pick(left: Value, right: Value, symbolic: str, array: str, plain: Any) -> Value:
    if isinstance(left, int) and isinstance(right, int):
        return plain(left, right)
    if any(hasattr(v, "free_symbols") for v in (left, right)):
        import sympy

        return getattr(sympy, symbolic)(left, right)
    import numpy as np

    return getattr(np, array)(left, right)


@cache
def symbol(name: str) -> sympy.Symbol:
    """The one symbol of a dimension (a positive integer), so that binding by name never misses."""
    import sympy

    return sympy.Symbol(name, integer=True, positive=True)


@attrs.frozen(cache_hash=True)
class Size:
    """A product of dimensions times an element width: `dims` in canonical order, `bits` per element."""

    dims: tuple[Dim, ...]
    bits: int

    def elements(self, bindings: Bindings) -> Value:
        """How many elements: the product of the bound dimensions."""
        return product(self.dims, bindings)

    def nbytes(self, bindings: Bindings) -> Value:
        """Exact bytes, before the allocator rounds."""
        return packed(self.elements(bindings), self.bits)

    def allocated(self, bindings: Bindings) -> Value:
        """Bytes the caching allocator hands out for it: `nbytes` rounded up to 512."""
        return round_up(self.nbytes(bindings), ALLOCATION_GRANULARITY)


@attrs.frozen(cache_hash=True)
class FlatSize:
    """A flat buffer: members concatenated, each `count` times and padded, of which one rank holds one of `shards`.

    What FSDP1, DeepSpeed and Megatron shard is such a concatenation, not a dimension.
    """

    members: tuple[tuple[int, tuple[Dim, ...]], ...]
    """How often, and the dimensions of each."""
    bits: int
    member_multiple: Dim = 1
    """Each member is padded to a multiple of this many elements."""
    last_padded: bool = True
    """Whether the last member is, too: not where it is the next member's start that has to be aligned."""
    total_multiple: tuple[Dim, ...] = ()
    """The whole is padded to a multiple of the product of these."""
    shards: tuple[Dim, ...] = ()
    """One rank holds the whole divided by their product, rounded up."""

    def elements(self, bindings: Bindings) -> Value:
        """How many elements one rank holds."""
        multiple = product((self.member_multiple,), bindings)
        total: Value = 0
        for count, dims in self.members:
            total = total + count * round_up(product(dims, bindings), multiple)
        if self.members and not self.last_padded:
            last = product(self.members[-1][1], bindings)
            total = total + last - round_up(last, multiple)
        whole = round_up(total, product(self.total_multiple, bindings))
        return ceil_div(whole, product(self.shards, bindings))

    def nbytes(self, bindings: Bindings) -> Value:
        """Exact bytes, before the allocator rounds."""
        return packed(self.elements(bindings), self.bits)

    def allocated(self, bindings: Bindings) -> Value:
        """Bytes the caching allocator hands out for it: `nbytes` rounded up to 512."""
        return round_up(self.nbytes(bindings), ALLOCATION_GRANULARITY)


@attrs.frozen(cache_hash=True)
class JoinedSize:
    """Flat buffers one after the other in one allocation: Megatron's buckets, each padded at its end."""

    parts: tuple[FlatSize, ...]
    """All of one element width."""

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return self.parts[0].bits

    def elements(self, bindings: Bindings) -> Value:
        """How many elements all parts hold."""
        total: Value = 0
        for part in self.parts:
            total = total + part.elements(bindings)
        return total

    def nbytes(self, bindings: Bindings) -> Value:
        """Exact bytes, before the allocator rounds."""
        return packed(self.elements(bindings), self.bits)

    def allocated(self, bindings: Bindings) -> Value:
        """Bytes the caching allocator hands out for it: `nbytes` rounded up to 512."""
        return round_up(self.nbytes(bindings), ALLOCATION_GRANULARITY)


@attrs.frozen(cache_hash=True)
class RepeatedSize:
    """`count` allocations of one size each, which stand together for the turns of a loop that are not built."""

    each: Size
    count: Dim

    @property
    def bits(self) -> int:
        """Bits of an element."""
        return self.each.bits

    def elements(self, bindings: Bindings) -> Value:
        """How many elements all of them hold."""
        return product((self.count,), bindings) * self.each.elements(bindings)

    def nbytes(self, bindings: Bindings) -> Value:
        """Exact bytes of all, before the allocator rounds."""
        return product((self.count,), bindings) * self.each.nbytes(bindings)

    def allocated(self, bindings: Bindings) -> Value:
        """Bytes the caching allocator hands out for all: it rounds each of them."""
        return product((self.count,), bindings) * self.each.allocated(bindings)


#: What a storage may be as big as.
AnySize: TypeAlias = Size | FlatSize | JoinedSize | RepeatedSize


def with_bits(size: AnySize, bits: int) -> AnySize:
    """As many elements of another width."""
    if isinstance(size, JoinedSize):
        return JoinedSize(tuple(attrs.evolve(part, bits=bits) for part in size.parts))
    if isinstance(size, RepeatedSize):
        return RepeatedSize(attrs.evolve(size.each, bits=bits), size.count)
    return attrs.evolve(size, bits=bits)


@lru_cache(maxsize=4096)
def size_of(dims: tuple[Dim, ...], bits: int) -> Size:
    """The `Size` of a tensor: constants multiplied out, names sorted, so that equal sizes compare equal."""
    constant = 1
    names = []
    for dim in dims:
        if isinstance(dim, int):
            constant *= dim
        else:
            names.append(dim)
    names.sort()
    return Size(dims=(*names, constant) if constant != 1 else tuple(names), bits=bits)


class Dimensions:
    """The dimension table of one simulation: every name, its value, and each derived one defined once."""

    def __init__(self, values: Mapping[str, Value] | None = None) -> None:
        self._values: dict[str, Value] = {}
        self.ones: set[Dim] = set()
        """Dimensions bound to 1."""
        for name, value in (values or {}).items():
            self.bind(name, value)

    @property
    def bindings(self) -> Bindings:
        """Name to value, ready for `Size.nbytes`."""
        return self._values

    def bind(self, name: str, value: Value) -> str:
        """Bind `name` to `value` and return the name to use.

        A layer whose value differs from an earlier layer's gets a numbered alias (``f``, ``f.2``),
        so that models with unlike layers keep one table.
        """
        candidate, number = name, 1
        while candidate in self._values and self._values[candidate] != value:
            number += 1
            candidate = f"{name}.{number}"
        self._values[candidate] = value
        if isinstance(value, int) and value == 1:
            self.ones.add(candidate)
        return candidate

    def split(self, dims: tuple[Dim, ...], axis: str) -> Dim:
        """The dimension of one rank's share of `dims` along mesh `axis`: rounded up, as `torch.chunk` does."""
        name = f"{'*'.join(map(str, dims)) or 1}/{axis}"
        return self.bind(name, ceil_div(product(dims, self._values), self._values[axis]))
