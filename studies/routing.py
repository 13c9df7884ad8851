"""How far the peak depends on which experts tokens go to: from even routing to the most uneven."""

from __future__ import annotations

import attrs

from simulator.model import ExpertsSpec, ModelSpec
from simulator.workload import MEGATRON
from studies.options import Resolved
from studies.ranks import simulate_ranks


@attrs.frozen
class RoutingBand:
    """Peaks of the fullest rank, in bytes."""

    even: int
    """Every expert gets as many tokens."""
    worst: int
    """The busiest gets `imbalance` times the mean, by default all that can be."""
    imbalance: float
    busiest: str = "one expert"
    """What that is: one expert of each layer, or the rank, with all of its experts."""


def routing_band(model: ModelSpec, resolved: Resolved) -> RoutingBand | None:
    """The band of a run whose sizes depend on routing; None for all others.

    Sizes do so of experts in a loop, and where Megatron-LM's ranks share experts and drop no token.
    """
    experts = [layer.channel_mixer for layer in model.layers if isinstance(layer.channel_mixer, ExpertsSpec)]
    shared = resolved.training.implementation in MEGATRON
    if not experts or not (_is_shared(resolved) if shared else resolved.training.experts == "eager"):
        return None
    most = max(_most(each, resolved.mesh.ep) if shared else each.experts / each.per_token for each in experts)
    given = resolved.training.expert_imbalance
    imbalance = given if given > 1 else most
    even, worst = (_peak(model, resolved, each) for each in (1.0, imbalance))
    return RoutingBand(even, worst, imbalance, "this rank" if shared else "one expert")


def _is_shared(resolved: Resolved) -> bool:
    return resolved.mesh.ep > 1 and resolved.training.capacity_factor is None


def _most(experts: ExpertsSpec, ranks: int) -> float:
    """Times the mean that a rank gets when every token goes to as many of its experts as it can."""
    return ranks * min(experts.per_token, experts.experts // ranks) / experts.per_token


def _peak(model: ModelSpec, resolved: Resolved, imbalance: float) -> int:
    training = attrs.evolve(resolved.training, expert_imbalance=imbalance)
    return simulate_ranks(model, attrs.evolve(resolved, training=training))[0].report.peak.nbytes
