"""Full activation checkpointing (Chen et al., arXiv:1604.06174): keep each layer's input, recompute the rest."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from hardware.errors import UnsupportedError
from simulator.plan import Plan
from simulator.workload import MEGATRON


@attrs.frozen
class FullCheckpointing:
    """Recompute every transformer layer in backward, as transformers' ``gradient_checkpointing_enable`` does.

    Non-reentrant (torch/utils/checkpoint.py): what forward saves inside a layer is dropped, the layer's
    arguments stay until the layer's backward is done, and recomputation stops at the last saved tensor.
    The embedding, the final norm and the head are not checkpointed.
    """

    name: str = attrs.field(default="full_checkpointing", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with every layer recomputed."""
        return recompute_layers(plan, self.name, range(len(plan.model.layers)))


def recompute_layers(plan: Plan, name: str, layers: Iterable[int], together: int = 1) -> Plan:
    """`plan` with `layers` recomputed, `together` of them as one checkpoint.

    Raises:
        UnsupportedError: another strategy says what is recomputed, or Megatron-LM's own model.
    """
    if plan.training.implementation in MEGATRON:
        raise UnsupportedError(f"{name} of Megatron-LM's own code is not modelled: leave it out")
    if plan.recomputed:
        raise UnsupportedError(f"{name} does not go with another checkpointing: choose one of the two")
    return attrs.evolve(plan, recomputed=frozenset(layers), together=together)
