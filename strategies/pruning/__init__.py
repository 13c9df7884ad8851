"""Structured pruning ("model surgery"): one technique per file, each a function from plan to plan.

They come first: the techniques that own weights, gradients or states work on the model that is left.
"""

from __future__ import annotations

from collections.abc import Callable

from hardware.registry import Registry
from simulator.plan import Strategy
from strategies.pruning.channels import PruneChannels
from strategies.pruning.experts import PruneExperts
from strategies.pruning.heads import PruneGroups, PruneHeads
from strategies.pruning.hidden import PruneHidden
from strategies.pruning.layers import PruneLayers

#: Makes a technique from an amount and the layers it applies to.
PruningFactory = Callable[..., Strategy]
#: What is pruned -> the technique that removes an amount of it from layers; whole layers are named by their indices.
prunings: Registry[PruningFactory] = Registry("structure to prune", "vramsim.prunings")
_BUILT_IN: dict[str, PruningFactory] = {
    "channels": PruneChannels,
    "experts": PruneExperts,
    "groups": PruneGroups,
    "heads": PruneHeads,
    "hidden": PruneHidden,
    "layers": PruneLayers,
}
for structure, factory in _BUILT_IN.items():
    prunings.add(structure, factory)
