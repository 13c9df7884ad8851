"""The skeleton of a causal language model: batch, masks, the walk over the layers, head and loss.

Each follows the Python of transformers 5.23 (file named per function), names that keep tensors alive included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hardware.dtypes import BOOL, FP32, INT64
from simulator import ops
from simulator.blocks import rotary_tables, vocabulary_head, vocabulary_table
from simulator.graph import Tensor
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Frame, Trace

#: Slot and spec of every layer to build.
BuiltLayers = Sequence[tuple[int, LayerSpec]]
#: Token ids and the embedding table to hidden states.
Embed = Callable[[Trace, Tensor, Tensor], Tensor]
#: Hidden states, rotary tables and mask through one layer.
Layer = Callable[[Trace, Tensor, tuple[Tensor, ...], Tensor | None, LayerSpec], Tensor]
#: Channels that turn and a tensor of the dtype wanted to the tables of positions.
Tables = Callable[[Trace, int, Tensor], tuple[Tensor, ...]]
#: A named norm.
Norm = Callable[[Trace, str, Tensor], Tensor]


#: What transformers' Trainer counts over the micro-batches of a step: the labels that are not ignored.
_ITEMS = "num_items_in_batch"


def rotary_decoder(
    t: Trace,
    spec: ModelSpec,
    layers: BuiltLayers,
    *,
    embed: Embed,
    layer: Layer,
    norm: Norm,
    windows: bool = False,
    tables: Tables = rotary_tables,
) -> None:
    """`...ForCausalLM` with rotary positions, from token ids to the loss (models/llama/modeling_llama.py).

    Args:
        layers: the layers to build.
        embed, layer, norm: what differs between families.
        windows: whether a second mask is made for layers with a sliding window.
        tables: makes what turns positions: cosines and sines, or whatever else `layer` takes.
    """
    ids, labels = batch(t)
    vocabulary = vocabulary_table(t, "model.embed_tokens")
    with t.call("model") as local:
        embeds = local("inputs_embeds", embed(t, vocabulary, ids))
        position_ids = local("position_ids", positions(t, ids))
        masks: dict[bool, Tensor] = {}
        for sliding in (False, True) if windows else (False,):
            mask = causal_mask(t, embeds)
            if mask is not None:
                masks[sliding] = local(f"mask.{sliding}", mask)
        turning = tables(t, spec.layers[0].attention.rotary_width, embeds)
        for index, table in enumerate(turning):
            local(f"table.{index}", table)
        hidden = local("hidden", embeds)
        for slot, one in layers:
            mask = masks.get(windows and one.attention.window is not None)
            with t.layer(slot, hidden, mask, *turning, position_ids):
                hidden = local("hidden", layer(t, hidden, turning, mask, one))
        hidden = local("hidden", norm(t, "norm", hidden))
    language_head(t, hidden, labels, spec, vocabulary)


def batch(t: Trace) -> tuple[Tensor, Tensor]:
    """The micro-batch: token ids, labels and, where the workload has one, a padding mask; all int64."""
    ids, labels = (t.input(name, "b", "s", dtype=INT64) for name in ("input_ids", "labels"))
    if t.regime.attention_mask != "none":
        t.input("attention_mask", "b", "s", dtype=INT64)
    if t.regime.items_in_batch:
        t.input(_ITEMS, dtype=INT64)
    return ids, labels


def positions(t: Trace, like: Tensor) -> Tensor:
    """``position_ids``: int64, one row."""
    row = ((), ("s",))
    with t.call(""):
        return ops.constant(t, "add.Tensor", ops.constant(t, "arange.default", like, dtype=INT64, shape=row))


def causal_mask(t: Trace, like: Tensor) -> Tensor | None:
    """The 4-D mask ``[b, 1, s, s]``: additive for eager attention, boolean for SDPA with real padding.

    Without padding SDPA and flash attention are told ``is_causal`` instead (masking_utils.py
    `_ignore_causal_mask_sdpa`, `flash_attention_mask`).
    """
    eager, padded = t.regime.attention == "eager", t.regime.attention_mask == "padded"
    if not eager and not (padded and t.regime.attention == "sdpa"):
        return None
    square = (("s",), ("s",))
    full = (("b",), *square)
    with t.call("") as local:
        for name, shape in (("batch", (("b",),)), ("head", ())):
            local(name, ops.constant(t, "arange.default", like, dtype=INT64, shape=shape))
        for name in ("query", "key"):
            local(name, positions(t, like))
        allowed = local("allowed", ops.constant(t, "le.Tensor", like, dtype=BOOL, shape=square))
        if padded:
            causal = local("causal", ops.constant(t, "bitwise_and.Tensor", allowed))
            allowed = local("allowed", ops.constant(t, "bitwise_and.Tensor", causal, shape=full))
        if not eager:
            return allowed
        return ops.constant(t, "where.self", allowed, dtype=like.dtype, shape=full)


def language_head(t: Trace, hidden: Tensor, labels: Tensor, spec: ModelSpec, vocabulary: Tensor) -> None:
    """``lm_head``, soft cap and loss of `...ForCausalLM.forward`; leaves the loss and the logits in the graph."""
    if t.regime.kernels.loss == "liger":
        _fused_language_head(t, hidden, labels, spec, vocabulary)
        return
    with t.call("", hidden) as local, t.loss_head():
        logits = local("logits", vocabulary_head(t, "lm_head", hidden, vocabulary if spec.tied_embeddings else None))
        if spec.final_softcap is not None:
            logits = local("logits", ops.div_scalar(t, logits))
            logits = local("logits", ops.tanh(t, logits))
            logits = local("logits", ops.mul_scalar(t, logits))
        loss = causal_lm_loss(t, logits, labels)
        set_loss(t, loss)
    t.graph.outputs = (logits, loss) if t.regime.loss_division else (logits,)


def _fused_language_head(t: Trace, hidden: Tensor, labels: Tensor, spec: ModelSpec, vocabulary: Tensor) -> None:
    """`lce_forward` (liger_kernel/transformers/model/llama.py) in training: the head's module never runs."""
    with t.call("", hidden), t.loss_head():
        weight = vocabulary if spec.tied_embeddings else t.matrix("lm_head.weight", ("V",), hidden.shape[-1])
        with t.call("loss_function", hidden) as local:  # `LigerForCausalLMLoss`
            shifted = shifted_labels(t, labels, local)
            flat = ops.reshape(t, hidden, (("b", "s"), hidden.shape[-1]))
            loss = divided_by_items(t, ops.liger_linear_cross_entropy(t, flat, weight, shifted))
        set_loss(t, loss)
    t.graph.outputs = (loss,) if t.regime.loss_division else ()


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
        shifted = shifted_labels(t, labels, local)
        flat = ops.reshape(t, logits, (("b", "s"), logits.shape[-1]))
        return divided_by_items(t, ops.nll_loss(t, ops.log_softmax(t, flat), shifted))


def shifted_labels(t: Trace, labels: Tensor, local: Frame) -> Tensor:
    """Labels padded by one column and shifted; both live in the loss function's frame."""
    longer = t.dim("s+1", t.dimensions.bindings["s"] + 1)
    padded = local("labels", ops.constant(t, "constant_pad_nd.default", labels, shape=(("b",), (longer,))))
    if "b" in t.dimensions.ones:
        return padded  # shifting one row leaves it contiguous; of several rows `contiguous` makes a copy
    return local("shifted", ops.constant(t, "clone.default", padded, shape=labels.shape))


def divided_by_items(t: Trace, loss: Tensor) -> Tensor:
    """`fixed_cross_entropy` (loss/loss_utils.py): a summed loss is divided by ``num_items_in_batch``, if given."""
    if not t.regime.items_in_batch:
        return loss
    (items,) = (x for x in t.graph.inputs if x.storage.label == _ITEMS)
    return ops.div_constant(t, loss, items)
