"""Pruning of whole layers (ShortGPT, Men et al., arXiv:2403.03853)."""

from __future__ import annotations

import attrs

from hardware.errors import UsageError
from simulator.plan import Plan
from strategies.pruning.amount import ranges, to_layers
from strategies.pruning.surgery import check_first, chosen_layers


@attrs.frozen
class PruneLayers:
    """Remove layers by their indices; those that are left close up."""

    layers: tuple[int, ...] = attrs.field(converter=to_layers)
    name: str = attrs.field(default="prune_layers", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the model without them; what is recomputed stays with the layers that are left."""
        check_first(plan, self.name)
        removed = set(chosen_layers(plan, self.layers))
        kept = [index for index in range(len(plan.model.layers)) if index not in removed]
        if not kept:
            raise UsageError(f"'layers' to prune must leave at least one of {len(plan.model.layers)}")
        model = attrs.evolve(plan.model, layers=tuple(plan.model.layers[index] for index in kept))
        recomputed = frozenset(new for new, old in enumerate(kept) if old in plan.recomputed)
        line = f"pruned: layers {ranges(self.layers)} of {len(plan.model.layers)}"
        return attrs.evolve(plan, model=model, recomputed=recomputed, assumptions=(*plan.assumptions, line))
