"""The skeleton of a causal language model: batch, masks, the walk over the layers, head and loss.

Each follows the Python of transformers 5.23 (file named per function), names that keep tensors alive included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hardware.dtypes import BOOL, FP32, INT64
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks import Norm, rotary_tables, token_embeddings, vocabulary_head, vocabulary_table
from simulator.graph import Shape, Tensor
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Trace

#: Slot and spec of every layer to build.
BuiltLayers = Sequence[tuple[int, LayerSpec]]
#: Token ids and the embedding table to hidden states.
Embed = Callable[[Trace, Tensor, Tensor], Tensor]
#: Hidden states, rotary tables and mask through one layer.
Layer = Callable[[Trace, Tensor, tuple[Tensor, ...], Tensor | None, LayerSpec], Tensor]


def rotary_decoder(
    t: Trace,
    spec: ModelSpec,
    layers: BuiltLayers,
    *,
    layer: Layer,
    norm: Norm,
    embed: Embed = token_embeddings,
    windows: Sequence[int | None] | None = None,
    make_tables: Callable[..., tuple[Tensor, ...]] = rotary_tables,
    tables_by_kind: bool = False,
    scale_logits: Callable[[Trace, Tensor], Tensor] | None = None,
) -> None:
    """`...ForCausalLM` with rotary positions, from token ids to the loss (models/llama/modeling_llama.py).

    Args:
        layers: the layers to build.
        layer, norm, embed: what differs between families.
        windows: of the masks that are made, None without one; by default those that the layers have.
        make_tables: `rotary_tables` with the options of the family.
        tables_by_kind: whether layers with and without a window have rotary tables of their own.
        scale_logits: what happens to the logits before they are soft-capped.
    """
    ids, labels = batch(t)
    vocabulary = vocabulary_table(t, "model.embed_tokens")
    with t.call("model") as local:
        embeds = local("inputs_embeds", embed(t, vocabulary, ids))
        position_ids = local("position_ids", positions(t, ids))
        masks: dict[int | None, Tensor] = {}
        for index, window in enumerate(own_windows(spec) if windows is None else windows):
            mask = causal_mask(t, embeds, window)
            if mask is not None:
                masks[window] = local(f"mask.{index}", mask)
        tables = {}
        for kind in _kinds(spec) if tables_by_kind else ("",):
            tables[kind] = make_tables(t, spec.layers[0].attention, embeds, kind=kind)
            for index, table in enumerate(tables[kind]):
                local(f"{kind}table.{index}", table)
        hidden = local("hidden", embeds)
        for slot, one in layers:
            own = tables[_kind(one) if tables_by_kind else ""]
            mask = masks.get(one.attention.window)
            with t.layer(slot, hidden, mask, *own, position_ids):
                hidden = local("hidden", layer(t, hidden, own, mask, one))
        hidden = local("hidden", norm(t, "norm", hidden))
    language_head(t, hidden, labels, spec, vocabulary, scale_logits)


def own_windows(spec: ModelSpec) -> list[int | None]:
    """The sliding windows that the layers of a model have, each once; None is that of layers without one."""
    return list(dict.fromkeys(layer.attention.window for layer in spec.layers))


def full_and_own_windows(spec: ModelSpec) -> list[int | None]:
    """As `own_windows`, with a mask without a window first, whether or not a layer wants it (Qwen)."""
    return list(dict.fromkeys([None, *own_windows(spec)]))


def full_and_sliding_windows(spec: ModelSpec) -> list[int | None]:
    """As `full_and_own_windows`, with a second mask even where no layer slides (Gemma)."""
    windows = full_and_own_windows(spec)
    return windows if len(windows) > 1 else [None, None]


def _kind(layer: LayerSpec) -> str:
    return "full_attention_" if layer.attention.window is None else "sliding_attention_"


def _kinds(spec: ModelSpec) -> list[str]:
    return list(dict.fromkeys(map(_kind, spec.layers)))


def only_eager(t: Trace, spec: ModelSpec) -> None:
    """Refuse every attention but ``eager`` for a family whose others are not there or not modelled."""
    if t.regime.attention != "eager":
        raise UnsupportedError(
            f"'attention' must be eager with {spec.family}, the only one modelled, not {t.regime.attention!r}"
        )


def batch(t: Trace, *, labelled: str = "tokens") -> tuple[Tensor, Tensor]:
    """The micro-batch: token ids, labels and, where the workload has one, a padding mask; all int64.

    Args:
        labelled: what has a label, each of the ``tokens`` or each of the ``sequences``.
    """
    ids = t.input("input_ids", "b", "s", dtype=INT64)
    labels = t.input("labels", *{"tokens": ("b", "s"), "sequences": ("b",)}[labelled], dtype=INT64)
    if t.regime.attention_mask != "none":
        t.input("attention_mask", "b", "s", dtype=INT64)
    return ids, labels


def positions(t: Trace, like: Tensor) -> Tensor:
    """``position_ids``: int64, one row."""
    row = ((), ("s",))
    with t.call(""):
        return ops.constant(t, "add.Tensor", ops.constant(t, "arange.default", like, dtype=INT64, shape=row))


def causal_mask(
    t: Trace, like: Tensor, window: int | None = None, *, skip: bool = True, ones: bool = False
) -> Tensor | None:
    """The 4-D mask ``[b, 1, s, s]``: additive for eager attention, boolean for SDPA with real padding or a window.

    Without either SDPA and flash attention are told ``is_causal`` instead (masking_utils.py
    `_ignore_causal_mask_sdpa`, `flash_attention_mask`). A window counts from sequences as long as it.

    Args:
        window: length of the sliding window in tokens; None for a plain causal mask.
        skip: whether the model lets SDPA go without a mask.
        ones: whether the model makes a padding mask of ones where the workload has none.
    """
    eager, padded = t.regime.attention == "eager", t.regime.attention_mask == "padded"
    windowed = window is not None and bool(t.dimensions.bindings["s"] >= window)
    if not eager and not (t.regime.attention == "sdpa" and (padded or windowed or not skip)):
        return None
    full = (("b",), ("s",), ("s",))
    with t.call("") as local:
        for name, shape in (("batch", (("b",),)), ("head", ())):
            local(name, ops.constant(t, "arange.default", like, dtype=INT64, shape=shape))
        for name in ("query", "key"):
            local(name, positions(t, like))
        allowed = local("allowed", _allowed(t, like, window))
        if ones or t.regime.attention_mask != "none":  # a mask of ones counts, too
            allowed = local("allowed", _and(t, local("causal", _and(t, allowed)), full))
        if not eager:
            return ops.expand(t, allowed, full) if allowed.shape != t.squeezed(full) else allowed
        return ops.constant(t, "where.self", allowed, dtype=like.dtype, shape=full)


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


def _and(t: Trace, x: Tensor, shape: Shape | None = None) -> Tensor:
    """One turn of `and_masks` (masking_utils.py)."""
    return ops.constant(t, "bitwise_and.Tensor", x, shape=shape)


def language_head(
    t: Trace,
    hidden: Tensor,
    labels: Tensor,
    spec: ModelSpec,
    vocabulary: Tensor,
    scale: Callable[[Trace, Tensor], Tensor] | None = None,
    *,
    name: str = "lm_head",
    bias: bool = False,
) -> None:
    """The head, scale, soft cap and loss of `...ForCausalLM.forward`; leaves loss and logits in the graph.

    Args:
        hidden: hidden states ``[b, s, h]``.
        vocabulary: the table that the head shares where embeddings are tied.
        scale: what happens to the logits first.
        name: of the head's module.
        bias: whether the head has one.
    """
    tied = vocabulary if spec.tied_embeddings else None
    with t.call("", hidden) as local, t.loss_head():
        logits = local("logits", vocabulary_head(t, name, hidden, tied, bias=bias))
        if scale is not None:
            logits = local("logits", scale(t, logits))
        if spec.final_softcap is not None:
            logits = local("logits", ops.div_scalar(t, logits))
            logits = local("logits", ops.tanh(t, logits))
            logits = local("logits", ops.mul_scalar(t, logits))
        loss = causal_lm_loss(t, logits, labels)
    leave_with(t, logits, loss)


def leave_with(t: Trace, logits: Tensor, loss: Tensor) -> None:
    """The model returns both: what they were made of goes before the caller divides the loss."""
    with t.loss_head():
        set_loss(t, loss)
    t.graph.outputs = (logits, loss) if t.regime.loss_division else (logits,)


def set_loss(t: Trace, loss: Tensor) -> None:
    """What backward starts from: the loss, the caller's share of it, or what an engine makes of it."""
    if not t.regime.scaled_loss:
        t.graph.loss = ops.div_scalar(t, loss) if t.regime.loss_division else loss
        return
    if t.graph.outside is None:
        t.leave_model()
    share = ops.div_scalar(t, loss)
    t.graph.loss = ops.mul_scalar(t, share)
    t.graph.held = (loss, share)


def cross_entropy_outside(t: Trace, logits: Tensor, labels: Tensor) -> None:
    """The trainer's loss on a model's logits: ``F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))``.

    Source: torchtitan/components/loss.py `cross_entropy_loss`; the trainer drops the logits before backward.
    """
    t.leave_model()
    with t.loss_head(), t.call("loss", logits):
        flat = ops.to(t, ops.reshape(t, logits, (("b", "s"), logits.shape[-1])), FP32)
        with t.call("", flat):
            parallel = t.regime.tensor_parallel
            if parallel and parallel.loss:
                loss = ops.parallel_cross_entropy(t, flat, labels)
            else:
                loss = ops.nll_loss(t, ops.log_softmax(t, flat), labels)
        set_loss(t, loss)
    t.graph.outputs = (logits, loss) if t.regime.loss_division else (logits,)


def causal_lm_loss(t: Trace, logits: Tensor, labels: Tensor) -> Tensor:
    """`ForCausalLMLoss` (loss/loss_utils.py): fp32 logits, padded and shifted labels, mean cross-entropy."""
    with t.call("loss_function", logits) as local:
        logits = local("logits", ops.to(t, logits, FP32))
        longer = t.dim("s+1", t.dimensions.bindings["s"] + 1)
        padded = local("labels", ops.constant(t, "constant_pad_nd.default", labels, shape=(("b",), (longer,))))
        shifted = padded  # shifting one row leaves it contiguous; of several rows `contiguous` makes a copy
        if "b" not in t.dimensions.ones:
            shifted = local("shifted", ops.constant(t, "clone.default", padded, shape=labels.shape))
        flat = ops.reshape(t, logits, (("b", "s"), logits.shape[-1]))
        return ops.nll_loss(t, ops.log_softmax(t, flat), shifted)
