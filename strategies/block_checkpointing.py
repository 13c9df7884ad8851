"""Checkpoint the first layers of the stack: Megatron-LM's ``--recompute-method block``.

Behaviour: megatron/core/transformer/transformer_block.py `_checkpointed_forward`; torch/utils/checkpoint.py.
"""

from __future__ import annotations

import attrs

from hardware.errors import UsageError
from simulator.plan import Plan
from strategies.checkpointing import OFFLOAD, REENTRANT, recompute_layers
from strategies.options import count, flag, option


@attrs.frozen(kw_only=True)
class BlockCheckpointing:
    """Recompute the first layers, each a checkpoint of its own; the rest keep what they save.

    Source: megatron/core/transformer/transformer_block.py `_checkpointed_forward`.
    """

    layers: int = option(1, count(1), "how many layers are checkpointed, from the first (--recompute-num-layers)")
    reentrant: bool = option(False, flag, REENTRANT)
    offload: bool = option(False, flag, OFFLOAD)
    name: str = attrs.field(default="checkpoint_block", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with its first layers recomputed."""
        most = len(plan.model.layers)
        if self.layers > most:
            raise UsageError(f"'layers' of {self.name} must be at most the model's {most} layers: {self.layers}")
        return recompute_layers(plan, self.name, range(self.layers), reentrant=self.reentrant, offload=self.offload)
