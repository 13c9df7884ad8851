"""Selective activation checkpointing per op: outputs of matrix products and attention stay, the rest is recomputed.

Source: torch 2.13 torch/utils/checkpoint.py `create_selective_checkpoint_contexts`; torchtitan
distributed/activation_checkpoint.py `_apply_op_sac`.
"""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator.plan import Plan
from strategies.checkpointing import recompute_layers
from strategies.options import count, flag, option

MATRIX_PRODUCT = "mm.default"
#: torchtitan's list, of which ``addmm`` (linear layers with a bias) is no part.
KEPT = frozenset(
    {
        MATRIX_PRODUCT,
        "_scaled_dot_product_efficient_attention.default",
        "_scaled_dot_product_flash_attention.default",
        "flex_attention",
        "max.default",
    }
)


@attrs.frozen(kw_only=True)
class OpCheckpointing:
    """Recompute layers, but for the outputs of some ops, which stay whether or not they are needed again."""

    every_second_mm: bool = option(True, flag, "every second matrix product is recomputed all the same")
    n: int = option(1, count(1), "every n-th layer is checkpointed, the first one among them")
    name: str = attrs.field(default="checkpoint_ops", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with layers recomputed but for those ops."""
        if plan.tensor_parallel is not None:
            raise UnsupportedError(f"{self.name} of tensor-parallel layers is not modelled: use full checkpointing")
        plan = recompute_layers(plan, self.name, range(0, len(plan.model.layers), self.n))
        return attrs.evolve(plan, kept_ops=KEPT, alternate_op=MATRIX_PRODUCT if self.every_second_mm else None)
