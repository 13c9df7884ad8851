"""Pruning of feed-forward channels (LLM-Pruner, arXiv:2305.11627; Sheared LLaMA, arXiv:2310.06694).

A channel is a row of the projections into the MLP and a column of the one out of it (the coupled structure of
LLM-Pruner, section 3.1). In a mixture of experts every expert loses as many.
"""

from __future__ import annotations

import attrs

from hardware.errors import UsageError
from simulator.model import ExpertsSpec, LayerSpec
from simulator.plan import Plan
from strategies.pruning.amount import Amount, to_amount, to_layers
from strategies.pruning.surgery import operate


@attrs.frozen
class PruneChannels:
    """Remove channels from each layer's MLP, or from each of its experts and, by a share, from the MLP they share."""

    amount: Amount = attrs.field(converter=to_amount)
    layers: tuple[int, ...] | None = attrs.field(default=None, converter=to_layers)
    name: str = attrs.field(default="prune_channels", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the model without them."""
        return operate(plan, self.name, "feed-forward channels", self.layers, self._cut)

    def _cut(self, layer: LayerSpec) -> tuple[LayerSpec, str] | None:
        mixer = layer.channel_mixer
        if mixer is None:
            return None
        removed = self.amount.of(mixer.width, 1, "channels")
        cut, line = attrs.evolve(mixer, width=mixer.width - removed), f"{removed} of {mixer.width} channels"
        if isinstance(cut, ExpertsSpec):
            line = f"{line} of each expert"
            if cut.shared_width is not None:
                fewer = self._of_shared(cut.shared_width)
                line = f"{line}, {fewer} of {cut.shared_width} of the shared MLP"
                cut = attrs.evolve(cut, shared_width=cut.shared_width - fewer)
        return attrs.evolve(layer, channel_mixer=cut), line

    def _of_shared(self, width: int) -> int:
        if self.amount.count:
            raise UsageError(f"'channels' to prune must be a percentage where experts share an MLP: {self.amount}")
        return self.amount.of(width, 1, "channels")
