"""Selective recomputation (Korthikanti et al., arXiv:2205.05198, section 5): of each layer the attention core alone.

Behaviour: torch/utils/checkpoint.py `checkpoint`, around what lies between projections.
"""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator.graph import ATTENTION_CORE
from simulator.plan import Plan
from strategies.module_checkpointing import recompute_modules, refuse_modules


@attrs.frozen
class AttentionCheckpointing:
    """Recompute what lies between projections: Megatron-LM's ``--recompute-granularity selective``.

    Queries, keys and values stay. Here the checkpoint is torch's non-reentrant one around the attention interface.
    """

    name: str = attrs.field(default="checkpoint_attention", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with every layer's attention core recomputed."""
        refuse_modules(plan, self.name)
        if not any(op.part == ATTENTION_CORE for op in plan.graph.ops):
            raise UnsupportedError(f"{self.name} of {plan.model.family} is not modelled: use checkpoint_modules")
        return recompute_modules(plan, self.name, frozenset((ATTENTION_CORE,)))
