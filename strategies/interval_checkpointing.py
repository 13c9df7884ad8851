"""Checkpoint every n-th layer: transformers' ``every_n_layers``, torchtitan's selective layers.

Behaviour: torchtitan/distributed/activation_checkpoint.py; torch/utils/checkpoint.py `checkpoint`.
"""

from __future__ import annotations

import attrs

from simulator.plan import Plan
from strategies.checkpointing import OFFLOAD, REENTRANT, recompute_layers
from strategies.options import count, flag, option


@attrs.frozen(kw_only=True)
class IntervalCheckpointing:
    """Recompute layers 0, n, 2n, ...; the others keep what they save.

    Source: transformers/modeling_utils.py `_set_gradient_checkpointing`.
    """

    n: int = option(2, count(1), "every n-th layer is checkpointed, the first one among them")
    reentrant: bool = option(False, flag, REENTRANT)
    offload: bool = option(False, flag, OFFLOAD)
    name: str = attrs.field(default="checkpoint_every", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with every n-th layer recomputed."""
        return recompute_layers(
            plan, self.name, range(0, len(plan.model.layers), self.n), reentrant=self.reentrant, offload=self.offload
        )
