"""Training on further tokens: a language model's head followed by multi-token prediction (arXiv:2412.19437, 2.2).

transformers has no such modules, so this is a training script around its model: one module after the other, each with
the shared embeddings and the shared head, on tokens and labels rolled by one, its loss scaled and added. Module for
module it is Megatron-LM's (megatron/core/transformer/multi_token_prediction.py `MultiTokenPredictionBlock`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import attrs

from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks import Norm, head_weight, predictor, roll, vocabulary_head
from simulator.graph import Tensor
from simulator.masks import causal_mask, positions
from simulator.model import LayerSpec, ModelSpec
from simulator.trace import Frame, Trace


@attrs.frozen(kw_only=True)
class Prediction:
    """What modules that predict further tokens take from the model before them."""

    layers: Sequence[tuple[int, LayerSpec]]
    """Slot and spec of the layer of each module."""
    embed: Callable[[Trace, Tensor, Tensor], Tensor]
    norm: Norm
    layer: Callable[[Trace, Tensor, tuple[Tensor, ...], Tensor | None, LayerSpec], Tensor]
    make_tables: Callable[..., tuple[Tensor, ...]]
    """Rotary tables, whose arguments are those of `rotary_tables`."""
    loss: Callable[[Trace, Tensor, Tensor], Tensor]
    """Logits and labels to the loss."""
    positions_to_layers: bool = True

    def head(
        self, t: Trace, hidden: Tensor, ids: Tensor, labels: Tensor, spec: ModelSpec, vocabulary: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The logits of the next token, and the loss over all depths.

        Args:
            hidden: hidden states ``[b, s, h]`` after the model's last norm.
            ids, labels: of the next token, ``[b, s]``.
            vocabulary: the embeddings, which all depths share.
        """
        tied = vocabulary if spec.tied_embeddings else None
        with t.call("") as local:
            local("hidden", hidden)
            with t.loss_head():
                logits = local("logits", vocabulary_head(t, "lm_head", hidden, tied))
                loss = local("loss", self.loss(t, logits, labels))
            weight = tied or head_weight(t, "lm_head")
            run = self._surrounded(t, local, hidden)
            for slot, _ in self.layers:
                with t.turn(slot):
                    ids, labels = local("ids", roll(t, ids)), local("labels", roll(t, labels))
                    with t.call("model"):
                        embeds = local("embeds", self.embed(t, vocabulary, ids))
                hidden = local("hidden", run(t, slot, hidden, embeds))
                with t.turn(slot), t.loss_head():
                    extra = local("extra", self.loss(t, vocabulary_head(t, "lm_head", hidden, weight), labels))
                    loss = local("loss", ops.add(t, loss, ops.mul_scalar(t, extra)))
        return logits, loss

    def _surrounded(self, t: Trace, local: Frame, hidden: Tensor) -> Callable[[Trace, int, Tensor, Tensor], Tensor]:
        """A module amid what all layers see: positions, rotary tables and mask, made once more."""
        spec = self.layers[0][1]
        place = local("position_ids", positions(t, hidden))
        with t.call("model"):
            tables = self.make_tables(t, spec.attention, hidden)
        for index, table in enumerate(tables):
            local(f"table.{index}", table)
        mask = causal_mask(t, hidden, spec.attention.window)
        around = (*([local("mask", mask)] if mask else []), *tables, *([place] if self.positions_to_layers else []))

        def layer(x: Tensor) -> Tensor:
            return self.layer(t, x, tables, mask, spec)

        return partial(predictor, norm=self.norm, layer=layer, arguments=around)


def check_predictable(spec: ModelSpec, *, like_llama: bool) -> None:
    """Refuse models whose last layer or head a predicting module was not compared with.

    Args:
        like_llama: whether logits, masks and rotary tables are all as Llama's.
    """
    reasons = {
        "its logits are scaled or capped, or its layers' masks or positions differ": not like_llama,
        "its last layer does not attend": not spec.layers[-1].attends,
        "it adds a load-balancing loss": spec.load_balancing,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedError(f"'mtp' is not modelled for this {spec.family}, because {reason}: set it to 0")
