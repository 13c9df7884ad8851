"""Checkpoint the stack in chunks of layers (Chen et al., arXiv:1604.06174, section 4.3): only a chunk's input stays.

Behaviour: megatron/core/transformer/transformer_block.py `_checkpointed_forward`; torch/utils/checkpoint.py.
"""

from __future__ import annotations

import attrs

from simulator.plan import Plan
from strategies.checkpointing import REENTRANT, recompute_layers
from strategies.options import count, flag, option


@attrs.frozen(kw_only=True)
class UniformCheckpointing:
    """Recompute chunk after chunk of consecutive layers, each chunk as one checkpoint; the last may be shorter.

    Source: Megatron-LM's ``--recompute-method uniform``, megatron/core/transformer/transformer_block.py
    `_checkpointed_forward`.
    """

    layers: int = option(1, count(1), "how many layers are one checkpoint (--recompute-num-layers)")
    reentrant: bool = option(False, flag, REENTRANT)
    name: str = attrs.field(default="checkpoint_uniform", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with every layer recomputed, chunk by chunk."""
        total = len(plan.model.layers)
        return recompute_layers(plan, self.name, range(total), min(self.layers, total), reentrant=self.reentrant)
