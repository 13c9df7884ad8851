"""Pruning of attention heads (Michel et al., arXiv:1905.10650): whole heads, or heads with the keys they share.

With grouped queries all groups must stay equally large, so as many heads go from each; multi-head attention loses
the keys and values of its heads with them.
"""

from __future__ import annotations

import attrs

from simulator.model import AttentionSpec, LayerSpec
from simulator.plan import Plan
from strategies.pruning.amount import Amount, to_amount, to_layers
from strategies.pruning.surgery import operate


@attrs.frozen
class PruneHeads:
    """Remove query heads from each layer: as many from every group that shares keys and values."""

    amount: Amount = attrs.field(converter=to_amount)
    layers: tuple[int, ...] | None = attrs.field(default=None, converter=to_layers)
    name: str = attrs.field(default="prune_heads", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the model without them."""
        return operate(plan, self.name, "attention heads", self.layers, self._cut)

    def _cut(self, layer: LayerSpec) -> tuple[LayerSpec, str] | None:
        attention = layer.token_mixer
        if not isinstance(attention, AttentionSpec):
            return None
        alone = attention.groups == 1
        removed = self.amount.of(attention.heads, 1 if alone else attention.kv_heads, "heads")
        left = attention.heads - removed
        cut = attrs.evolve(attention, heads=left, kv_heads=left if alone else attention.kv_heads)
        each = "" if alone else f", {removed // attention.kv_heads} of each group"
        return attrs.evolve(layer, token_mixer=cut), f"{removed} of {attention.heads} heads{each}"


@attrs.frozen
class PruneGroups:
    """Remove key/value heads from each layer, with all query heads that share them."""

    amount: Amount = attrs.field(converter=to_amount)
    layers: tuple[int, ...] | None = attrs.field(default=None, converter=to_layers)
    name: str = attrs.field(default="prune_groups", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the model without them."""
        return operate(plan, self.name, "groups of heads", self.layers, self._cut)

    def _cut(self, layer: LayerSpec) -> tuple[LayerSpec, str] | None:
        attention = layer.token_mixer
        if not isinstance(attention, AttentionSpec):
            return None
        removed = self.amount.of(attention.kv_heads, 1, "groups")
        left = attention.kv_heads - removed
        cut = attrs.evolve(attention, heads=left * attention.groups, kv_heads=left)
        line = f"{removed} of {attention.kv_heads} groups of {attention.groups} heads"
        return attrs.evolve(layer, token_mixer=cut), line
