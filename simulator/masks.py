"""Attention masks (transformers 5.23 masking_utils.py), and the positions that they compare."""

from __future__ import annotations

from hardware.dtypes import BOOL, INT64
from simulator import ops
from simulator.context_parallel import AXIS
from simulator.graph import Shape, Tensor
from simulator.trace import Frame, Trace


def positions(t: Trace, like: Tensor) -> Tensor:
    """``position_ids``: int64, one row."""
    row = ((), ("s",))
    with t.call(""):
        return ops.constant(t, "add.Tensor", ops.constant(t, "arange.default", like, dtype=INT64, shape=row))


def recurrent_mask(t: Trace) -> Tensor | None:
    """The padding mask ``[b, s]`` of layers without attention: the batch's own where there is real padding.

    Source: masking_utils.py `create_recurrent_attention_mask`, which looks whether it is all ones.
    """
    if t.regime.attention_mask == "none":
        return None
    given = next(tensor for tensor in t.graph.inputs if tensor.storage.label == "attention_mask")
    ones = ops.constant(t, "eq.Scalar", given, dtype=BOOL)
    ops.constant(t, "all.default", ones, shape=())
    return given if t.regime.attention_mask == "padded" else None


def bidirectional_mask(t: Trace, like: Tensor) -> Tensor | None:
    """The 4-D mask ``[b, 1, s, s]`` that hides padding; none where nothing is padded, a mask of ones included.

    Source: masking_utils.py `create_bidirectional_mask`, `_ignore_bidirectional_mask_sdpa`.

    Args:
        t: the trace.
        like: hidden states, whose dtype the mask of eager attention has; SDPA's is boolean.
    """
    if t.regime.attention_mask != "padded" or t.regime.attention == "flash_attention_2":
        return None
    full = (("b",), ("s",), ("s",))
    with t.call("") as local:
        _indices(t, like, local)
        allowed = local("allowed", ops.constant(t, "ge.Scalar", like, dtype=BOOL, shape=(("s",), ())))
        allowed = local("allowed", ops.constant(t, "bitwise_and.Tensor", allowed, shape=full))
        if t.regime.attention != "eager":
            return allowed
        return ops.constant(t, "where.self", allowed, dtype=like.dtype)


def _indices(t: Trace, like: Tensor, local: Frame) -> None:
    """What a mask function compares: of sequences, heads, queries and keys."""
    for name, shape in (("batch", (("b",),)), ("head", ())):
        local(name, ops.constant(t, "arange.default", like, dtype=INT64, shape=shape))
    for name in ("query", "key"):
        local(name, positions(t, like))


def causal_mask(
    t: Trace, like: Tensor, window: int | None = None, *, skip: bool = True, ones: bool = False, chunked: bool = False
) -> Tensor | None:
    """The 4-D mask ``[b, 1, s, s]``: additive for eager attention, boolean for SDPA with real padding or a window.

    Without either SDPA and flash attention are told ``is_causal`` instead (masking_utils.py
    `_ignore_causal_mask_sdpa`, `flash_attention_mask`). A window counts from sequences as long as it.

    Args:
        window: length of the sliding window in tokens; None for a plain causal mask.
        skip: whether the model lets SDPA go without a mask.
        ones: whether the model makes a padding mask of ones where the workload has none.
        chunked: whether the window is a chunk.
    """
    if t.regime.context_parallel is not None:
        return packed_mask(t, like)
    eager, padded = t.regime.attention == "eager", t.regime.attention_mask == "padded"
    windowed = window is not None and bool(t.dimensions.bindings["s"] >= window)
    if not eager and not (t.regime.attention == "sdpa" and (padded or windowed or not skip)):
        return None
    full = (("b",), ("s",), ("s",))
    with t.call("") as local:
        _indices(t, like, local)
        if window is not None and chunked:
            local("left_padding_tokens", ops.constant(t, "zeros.default", like, dtype=INT64, shape=(("b",),)))
            allowed = local("allowed", _allowed_in_chunks(t, like))
        else:
            allowed = local("allowed", _allowed(t, like, window))
        if ones or t.regime.attention_mask != "none":  # a mask of ones counts, too
            allowed = local("allowed", _and(t, local("causal", _and(t, allowed)), full))
        if not eager:
            return ops.expand(t, allowed, full) if allowed.shape != t.squeezed(full) else allowed
        return ops.constant(t, "where.self", allowed, dtype=like.dtype, shape=full)


def packed_mask(t: Trace, like: Tensor) -> Tensor | None:
    """The boolean mask ``[b, 1, s, s]`` of sequences taken for packed ones, because their positions jump.

    The two chunks of a sequence that a rank along ``cp`` has lie apart, but those of the last rank. Attention is not
    given the mask (accelerate, big_modeling.py `_attach_context_parallel_hooks`); it lives all the same.

    Source: masking_utils.py `find_packed_sequence_indices`, `packed_sequence_compatibility_function`.
    """
    assert t.regime.context_parallel is not None
    rows, full = (("b",), ("s",)), (("b",), ("s",), ("s",))
    with t.call("") as local:
        with t.call("") as finding:
            finding("first", ops.constant(t, "sub.Tensor", like, dtype=INT64, shape=(("b",),)))
            longer = (("b",), (t.dim("s+1", t.dimensions.bindings["s"] + 1),))
            with t.call("", ops.constant(t, "cat.default", like, dtype=INT64, shape=longer)):
                finding("diff", ops.constant(t, "sub.Tensor", like, dtype=INT64, shape=rows))
            with t.call("", ops.constant(t, "ne.Scalar", like, dtype=BOOL, shape=rows)):
                local("packed", ops.constant(t, "cumsum.default", like, dtype=INT64, shape=rows))
        if t.regime.context_parallel.rank == t.dimensions.bindings[AXIS] - 1:
            return None
        _indices(t, like, local)
        result = local("result", ops.constant(t, "new_ones.default", like, dtype=BOOL, shape=()))
        for name in ("eq.Tensor", "le.Tensor"):
            with t.call("") as turn:
                with t.call("") as indices:
                    for each in ("query", "key"):
                        indices(each, ops.constant(t, "index.Tensor", like, dtype=INT64, shape=rows))
                    allowed = turn("allowed", ops.constant(t, name, like, dtype=BOOL, shape=full))
                result = local("result", _and(t, allowed, full))
        return result


def _allowed(t: Trace, like: Tensor, window: int | None) -> Tensor:
    """`causal_mask_function`, or `sliding_window_causal_mask_function` that joins it with the window."""
    square = (("s",), ("s",))
    if window is None:
        return ops.constant(t, "le.Tensor", like, dtype=BOOL, shape=square)
    with t.call("") as local:
        with t.call("") as overlay:
            overlay("start", ops.constant(t, "sub.Tensor", like, dtype=INT64, shape=(("s",),)))
            inside = ops.constant(t, "gt.Tensor", like, dtype=BOOL, shape=square)
        allowed = local("result", _and(t, inside))
        with t.call("", ops.constant(t, "le.Tensor", like, dtype=BOOL, shape=square)):
            return _and(t, allowed)


def _allowed_in_chunks(t: Trace, like: Tensor) -> Tensor:
    """`chunked_causal_mask_function`: chunks count from where the padding of a sequence ends."""
    full = (("b",), ("s",), ("s",))
    with t.call("") as local:
        with t.call("") as overlay:
            for name in ("key", "query"):
                with t.call("") as inner:
                    inner("padding", ops.constant(t, "index.Tensor", like, dtype=INT64, shape=(("b",),)))
                    place = ops.constant(t, "sub.Tensor", like, dtype=INT64, shape=(("b",), ("s",)))
                    inner("place", place)
                    overlay(name, ops.constant(t, "floor_divide.default", place))
            inside = ops.constant(t, "eq.Tensor", like, dtype=BOOL, shape=full)
        allowed = local("result", _and(t, inside))
        with t.call("", ops.constant(t, "le.Tensor", like, dtype=BOOL, shape=(("s",), ("s",)))):
            return _and(t, allowed)


def _and(t: Trace, x: Tensor, shape: Shape | None = None) -> Tensor:
    """One turn of `and_masks` (masking_utils.py)."""
    return ops.constant(t, "bitwise_and.Tensor", x, shape=shape)
