"""Full activation checkpointing (Chen et al., arXiv:1604.06174): keep each layer's input, recompute the rest."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import attrs

from hardware.errors import UnsupportedError
from simulator.plan import Plan
from simulator.workload import MEGATRON
from strategies.options import flag, option

#: What the options say that checkpointing of layers has.
REENTRANT = "use_reentrant=True of torch.utils.checkpoint: its own backward inside that of the graph"
OFFLOAD = "layer inputs wait in pinned host memory (save_on_cpu; transformers' offload=True)"


@attrs.frozen(kw_only=True)
class FullCheckpointing:
    """Recompute every transformer layer in backward, as transformers' ``gradient_checkpointing_enable`` does.

    Non-reentrant (torch/utils/checkpoint.py): what forward saves inside a layer is dropped, the layer's
    arguments stay until the layer's backward is done, and recomputation stops at the last saved tensor.
    Reentrant: forward runs under ``torch.no_grad``, all of a layer is run again, and a backward of its own runs inside
    that of the whole graph, which holds the gradient that it came with. The embedding, the final norm and the head
    are not checkpointed.
    """

    reentrant: bool = option(False, flag, REENTRANT)
    offload: bool = option(False, flag, OFFLOAD)
    name: str = attrs.field(default="full_checkpointing", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with every layer recomputed."""
        return recompute_layers(
            plan, self.name, range(len(plan.model.layers)), reentrant=self.reentrant, offload=self.offload
        )


def recompute_layers(
    plan: Plan,
    name: str,
    layers: Iterable[int],
    together: int = 1,
    *,
    reentrant: bool = False,
    offload: bool = False,
) -> Plan:
    """`plan` with `layers` recomputed, `together` of them as one checkpoint.

    Raises:
        UnsupportedError: another strategy says what is recomputed, Megatron-LM's own model, or one whose reentrant
            checkpoints were not compared.
    """
    if plan.training.implementation in MEGATRON:
        raise UnsupportedError(f"{name} of Megatron-LM's own code is not modelled: leave it out")
    if plan.recomputed:
        raise UnsupportedError(f"{name} does not go with another checkpointing: choose one of the two")
    chosen = sorted(layers)
    if offload and (reentrant or together > 1 or plan.training.implementation != "transformers"):
        raise UnsupportedError(
            f"'offload' of {name} goes with transformers' own, non-reentrant checkpoints of one layer"
        )
    if reentrant:
        refuse_reentrant(plan, name)
        # a gradient made in one checkpoint is what the one before it begins with, across the layers between them
        gaps = [after - before for before, after in pairwise(chosen)]
        plan = attrs.evolve(plan, reach=max(plan.reach, *gaps, 1))
    return attrs.evolve(plan, recomputed=frozenset(chosen), together=together, reentrant=reentrant, offloaded=offload)


def refuse_reentrant(plan: Plan, name: str) -> None:
    """`UnsupportedError` for models and frameworks whose reentrant checkpoints were not compared."""
    if plan.model.family == "bloom":
        raise UnsupportedError(f"reentrant {name} of bloom is not modelled: leave 'reentrant' out")
    if plan.model.load_balancing:  # logits made in one need no gradient, so the added loss reaches no router
        raise UnsupportedError(f"reentrant {name} with output_router_logits is not modelled: leave 'reentrant' out")
