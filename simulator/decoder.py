"""The skeleton of a causal language model: batch, masks, the walk over the layers, head and loss.

Each follows the Python of transformers 5.23 (file named per function), names that keep tensors alive included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hardware.dtypes import FP32, INT64
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks import (
    Norm,
    add_load_balancing_loss,
    rotary_tables,
    token_embeddings,
    vocabulary_head,
    vocabulary_table,
)
from simulator.graph import ForwardGraph, Tensor, flat
from simulator.masks import causal_mask, positions, recurrent_mask
from simulator.model import AttentionSpec, LayerSpec, ModelSpec, PredictorSpec
from simulator.prediction import Prediction, check_predictable
from simulator.sharded_batch import sharded_batch
from simulator.trace import Frame, Trace

#: Slot and spec of every layer to build.
BuiltLayers = Sequence[tuple[int, LayerSpec]]
#: Token ids and the embedding table to hidden states.
Embed = Callable[[Trace, Tensor, Tensor], Tensor]
#: Hidden states, rotary tables and mask through one layer.
Layer = Callable[[Trace, Tensor, tuple[Tensor, ...], Tensor | None, LayerSpec], Tensor]


#: What transformers' Trainer counts over the micro-batches of a step: the labels that are not ignored.
_ITEMS = "num_items_in_batch"


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
    chunked: bool = False,
    scale_logits: Callable[[Trace, Tensor], Tensor] | None = None,
    positions_to_layers: bool = True,
) -> None:
    """`...ForCausalLM` with rotary positions, from token ids to the loss (models/llama/modeling_llama.py).

    Args:
        layers: the layers to build.
        layer, norm, embed: what differs between families.
        windows: of the masks that are made, None without one; by default those that the layers have.
        make_tables: `rotary_tables` with the options of the family.
        tables_by_kind: whether layers with and without a window have rotary tables of their own.
        chunked: whether windows are chunks, in which alone tokens see each other (Llama 4).
        scale_logits: what happens to the logits before they are soft-capped.
        positions_to_layers: whether layers are called with the positions, too.
    """
    predictors = [(slot, each) for slot, each in layers if isinstance(each, PredictorSpec)]
    layers = layers[: len(layers) - len(predictors)]
    ids, labels = batch(t)
    vocabulary = vocabulary_table(t, "model.embed_tokens") if t.stage.first else None
    with t.call("model") as local:
        embeds = local("inputs_embeds", embed(t, vocabulary, ids) if vocabulary else t.receive())
        given = given_input(t, "position_ids")
        position_ids = given or local("position_ids", positions(t, ids))
        masks = _masks(t, local, embeds, own_windows(spec) if windows is None else windows, chunked=chunked)
        padding = recurrent_mask(t) if len(attentions(spec)) < len(spec.layers) else None
        first = next(iter(attentions(spec)), None)
        kinds = _kinds(spec) if tables_by_kind else ("",)
        tables = {kind: _held(local, kind, make_tables(t, first, embeds, kind=kind)) for kind in kinds}
        hidden = local("hidden", embeds)
        for slot, one in layers:
            own = tables[_kind(one) if tables_by_kind else ""]
            mask = masks.get(one.attention.window) if one.attends else padding
            with t.layer(slot, hidden, mask, *own, position_ids if positions_to_layers else None):
                hidden = local("hidden", layer(t, hidden, own, mask, one))
        if t.stage.last:
            hidden = local("hidden", norm(t, "norm", hidden))
    if predictors and vocabulary:
        check_predictable(spec, like_llama=not (scale_logits or spec.final_softcap or tables_by_kind or chunked))
        prediction = Prediction(
            layers=predictors,
            embed=embed,
            norm=norm,
            layer=layer,
            make_tables=make_tables,
            loss=causal_lm_loss,
            positions_to_layers=positions_to_layers,
        )
        leave_with(t, *prediction.head(t, hidden, ids, labels, spec, vocabulary))
    elif t.stage.last:
        language_head(t, hidden, labels, spec, vocabulary, scale_logits)
    else:
        t.send(hidden)


def _masks(
    t: Trace, local: Frame, embeds: Tensor, windows: Sequence[int | None], *, chunked: bool
) -> dict[int | None, Tensor]:
    """The masks of layers by their windows, as far as they are made."""
    masks: dict[int | None, Tensor] = {}
    for index, window in enumerate(windows):
        mask = causal_mask(t, embeds, window, chunked=chunked)
        if mask is not None:
            masks[window] = local(f"mask.{index}", mask)
    return masks


def _held(local: Frame, kind: str, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rotary tables as locals of the model's forward."""
    return tuple(local(f"{kind}table.{index}", table) for index, table in enumerate(tables))


def attentions(spec: ModelSpec) -> list[AttentionSpec]:
    """The attention of the layers that have it."""
    return [layer.token_mixer for layer in spec.layers if isinstance(layer.token_mixer, AttentionSpec)]


def own_windows(spec: ModelSpec) -> list[int | None]:
    """The sliding windows that the layers of a model have, each once; None is that of layers without one."""
    return list(dict.fromkeys(each.window for each in attentions(spec)))


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
    if t.regime.context_parallel is not None and t.regime.implementation == "transformers":
        return sharded_batch(t)
    ids = t.input("input_ids", "b", "s", dtype=INT64)
    labels = t.input("labels", *{"tokens": ("b", "s"), "sequences": ("b",)}[labelled], dtype=INT64)
    if t.regime.attention_mask != "none":
        t.input("attention_mask", "b", "s", dtype=INT64)
    if t.regime.items_in_batch:
        t.input(_ITEMS, dtype=INT64)
    return ids, labels


def given_input(t: Trace, name: str) -> Tensor | None:
    """The input `name` where the caller gives one."""
    return next((tensor for tensor in t.graph.inputs if tensor.storage.label == name), None)


def language_head(
    t: Trace,
    hidden: Tensor,
    labels: Tensor,
    spec: ModelSpec,
    vocabulary: Tensor | None,
    scale: Callable[[Trace, Tensor], Tensor] | None = None,
    *,
    name: str = "lm_head",
    bias: bool = False,
    low_input: bool = False,
) -> None:
    """The head, scale, soft cap and loss of `...ForCausalLM.forward`; leaves loss and logits in the graph.

    Args:
        hidden: hidden states ``[b, s, h]``.
        vocabulary: the table that the head shares where embeddings are tied; None where it is on another stage.
        scale: what happens to the logits first.
        name: of the head's module.
        bias: whether the head has one.
        low_input: whether the head casts `hidden` to the element type of its weight.
    """
    if t.regime.liger.fused_linear_cross_entropy:
        if spec.load_balancing:
            raise UnsupportedError(
                "'liger' fused_linear_cross_entropy with output_router_logits is not modelled: leave one of them out"
            )
        _fused_language_head(t, hidden, labels, spec, vocabulary)
        return
    tied = vocabulary if spec.tied_embeddings else None
    with t.call("", hidden) as local, t.loss_head():
        hidden = ops.to(t, hidden, t.regime.weights) if low_input else hidden
        logits = local("logits", vocabulary_head(t, name, hidden, tied, bias=bias))
        if scale is not None:
            logits = local("logits", scale(t, logits))
        if spec.final_softcap is not None:
            logits = local("logits", ops.div_scalar(t, logits))
            logits = local("logits", ops.tanh(t, logits))
            logits = local("logits", ops.mul_scalar(t, logits))
        loss = None if t.regime.pipelined else causal_lm_loss(t, logits, labels)
        kept: tuple[Tensor, ...] = ()
        if loss is not None and spec.load_balancing:
            loss, balance = add_load_balancing_loss(t, loss)
            kept = (local("aux_loss", balance), *t.router_logits.values())
    if loss is None:  # a stage returns logits, of which the schedule has the loss computed
        cross_entropy_outside(t, logits, labels)
        return
    leave_with(t, logits, loss)
    t.graph.outputs += kept


def leave_with(t: Trace, logits: Tensor, loss: Tensor) -> None:
    """The model returns both: what they were made of goes before the caller divides the loss."""
    with t.loss_head():
        set_loss(t, loss)
    t.graph.outputs = (logits, loss) if t.regime.loss_division else (logits,)


def _fused_language_head(t: Trace, hidden: Tensor, labels: Tensor, spec: ModelSpec, vocabulary: Tensor | None) -> None:
    """`lce_forward` (liger_kernel/transformers/model/llama.py) in training: the head's module never runs."""
    with t.call("", hidden), t.loss_head():
        weight = (
            vocabulary if vocabulary and spec.tied_embeddings else t.matrix("lm_head.weight", ("V",), hidden.shape[-1])
        )
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
    t.graph.held = (*t.graph.held, loss, share)


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
    with t.call("loss_function") as local:
        logits = local("logits", ops.to(t, local("logits", logits), FP32))
        shifted = shifted_labels(t, labels, local)
        flat = ops.reshape(t, logits, (("b", "s"), logits.shape[-1]))
        if t.regime.liger.cross_entropy:
            return divided_by_items(t, ops.liger_cross_entropy(t, flat, shifted))
        return divided_by_items(t, ops.nll_loss(t, ops.log_softmax(t, flat), shifted))


def shifted_labels(t: Trace, labels: Tensor, local: Frame) -> Tensor:
    """Labels padded by one column and shifted; both live in the loss function's frame."""
    given = given_input(t, "shift_labels")
    if given is not None:
        return given
    longer = t.dim("s+1", t.dimensions.bindings["s"] + 1)
    padded = local("labels", ops.constant(t, "constant_pad_nd.default", labels, shape=(("b",), (longer,))))
    if "b" in t.dimensions.ones:
        # shifting one row leaves it contiguous; of several rows `contiguous` makes a copy
        shifted = t.view(padded, labels.shape, flat(labels.shape))
        t.emit("slice.Tensor", [padded], [shifted])
        return shifted
    return local("shifted", ops.constant(t, "clone.default", padded, shape=labels.shape))


def divided_by_items(t: Trace, loss: Tensor) -> Tensor:
    """`fixed_cross_entropy` (loss/loss_utils.py): a summed loss is divided by ``num_items_in_batch``, if given."""
    if not t.regime.items_in_batch:
        return loss
    (items,) = items_of(t.graph)
    return ops.div_constant(t, loss, items)


def items_of(graph: ForwardGraph) -> list[Tensor]:
    """The input ``num_items_in_batch`` of a forward graph, if it has one."""
    return [x for x in graph.inputs if x.storage.label == _ITEMS]
