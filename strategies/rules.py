"""Which strategies go together: rules that several of them share.

Order: strategies act in the order in which they are applied. One that owns the weights (it shards or flattens them, or
reduces their gradients) comes before one that works on what the rank keeps, such as an optimizer wrapper.
"""

from __future__ import annotations

from hardware.errors import UnsupportedError
from simulator.plan import Plan

#: Owners of the weights whose gradients are known to be summed over ``cp``, too.
SUMS_OVER_SEQUENCES = ("megatron_distributed_optimizer", "fsdp2")


def owner(plan: Plan) -> str | None:
    """The name of the strategy of `plan` that owns the weights over data-parallel ranks, if any."""
    for hooks in plan.hooks:
        if str(getattr(hooks, "axis", "")).startswith("dp_"):
            return str(getattr(hooks, "name", type(hooks).__name__))
    return None


def refuse_second_owner(plan: Plan, name: str) -> None:
    """`UnsupportedError` where another strategy owns the weights already, or some of them are frozen."""
    refuse_frozen(plan, name)
    if plan.context_parallel is not None and name not in SUMS_OVER_SEQUENCES:
        raise UnsupportedError(
            f"{name} with 'cp' above 1 is not modelled: use {' or '.join(SUMS_OVER_SEQUENCES)}, or cp 1"
        )
    first = owner(plan)
    if first is not None:
        raise UnsupportedError(f"{name} does not go with {first}: both own the weights; choose one of the two")


def refuse_frozen(plan: Plan, name: str) -> None:
    """`UnsupportedError` where some weights are frozen: what a framework keeps of them was not compared yet."""
    if plan.frozen or plan.frozen_layers:
        raise UnsupportedError(f"{name} on partly frozen weights is not modelled: train all of them, or leave it out")


def refuse_tensor_parallel(plan: Plan, name: str) -> None:
    """`UnsupportedError` on a model sharded along ``tp``: flat buffers over such shards were not compared yet."""
    if plan.tensor_parallel:
        raise UnsupportedError(f"{name} on weights sharded along 'tp' is not modelled: use fsdp2, or tp 1")


def refuse_load_balancing(plan: Plan, name: str) -> None:
    """`UnsupportedError` on a loss added for the routers: what hooks of each module do about it was not compared."""
    if plan.model.load_balancing:
        raise UnsupportedError(f"{name} with output_router_logits is not modelled: set it to false, or use fsdp2")
