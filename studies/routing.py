"""How far the peak depends on which experts tokens go to: from even routing to the most uneven."""

from __future__ import annotations

import attrs

from simulator.model import ExpertsSpec, ModelSpec
from studies.options import Resolved
from studies.ranks import simulate_ranks


@attrs.frozen
class RoutingBand:
    """Peaks of the fullest rank, in bytes."""

    even: int
    """Every expert gets as many tokens."""
    worst: int
    """One expert of each layer gets `imbalance` times the mean, by default every token."""
    imbalance: float


def routing_band(model: ModelSpec, resolved: Resolved) -> RoutingBand | None:
    """The band of a run whose sizes depend on routing: experts in a loop; None for all others."""
    experts = [layer.channel_mixer for layer in model.layers if isinstance(layer.channel_mixer, ExpertsSpec)]
    if resolved.training.experts != "eager" or not experts:
        return None
    most = max(each.experts / each.per_token for each in experts)
    given = resolved.training.expert_imbalance
    imbalance = given if given > 1 else most
    even, worst = (_peak(model, resolved, each) for each in (1.0, imbalance))
    return RoutingBand(even, worst, imbalance)


def _peak(model: ModelSpec, resolved: Resolved, imbalance: float) -> int:
    training = attrs.evolve(resolved.training, expert_imbalance=imbalance)
    return simulate_ranks(model, attrs.evolve(resolved, training=training))[0].report.peak.nbytes
