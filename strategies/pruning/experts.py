"""Pruning of whole experts (Lu et al., "Not All Experts are Equal", arXiv:2402.14800)."""

from __future__ import annotations

import attrs

from simulator.model import ExpertsSpec, LayerSpec
from simulator.plan import Plan
from strategies.pruning.amount import Amount, to_amount, to_layers
from strategies.pruning.surgery import operate


@attrs.frozen
class PruneExperts:
    """Remove routed experts, with their rows of the router; as many from each group where the router has groups."""

    amount: Amount = attrs.field(converter=to_amount)
    layers: tuple[int, ...] | None = attrs.field(default=None, converter=to_layers)
    name: str = attrs.field(default="prune_experts", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the model without them; `UsageError` where a token visits more than are left."""
        return operate(plan, self.name, "experts", self.layers, self._cut)

    def _cut(self, layer: LayerSpec) -> tuple[LayerSpec, str] | None:
        mixer = layer.channel_mixer
        if not isinstance(mixer, ExpertsSpec):
            return None
        removed = self.amount.of(mixer.experts, mixer.groups, "experts")
        cut = attrs.evolve(mixer, experts=mixer.experts - removed)
        return attrs.evolve(layer, channel_mixer=cut), f"{removed} of {mixer.experts} experts"
