"""Full activation checkpointing (Chen et al., arXiv:1604.06174): keep each layer's input, recompute the rest."""

from __future__ import annotations

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
        if plan.training.implementation in MEGATRON:
            raise UnsupportedError(f"{self.name} of Megatron-LM's own code is not modelled: leave it out")
        return attrs.evolve(plan, recomputed=frozenset(range(len(plan.model.layers))))
