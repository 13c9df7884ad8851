"""The operation behind every pruning technique: other layers in the place of those that a model has.

What is pruned is gone from the weights, as after `torch.nn.utils.prune` and a rewrite of the linear layers: nothing is
masked. Which heads or channels go decides quality, not memory, so only their number is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.model import LayerSpec
from simulator.plan import Plan
from strategies.pruning.amount import ranges

#: A layer without what is pruned, and how much that is; None where the layer has nothing of the kind.
Cut = Callable[[LayerSpec], tuple[LayerSpec, str] | None]


def check_first(plan: Plan, name: str) -> None:
    """Refuse a plan that other techniques have shaped to the layers before, and code whose layers are all alike."""
    if plan.hooks or plan.tensor_parallel or plan.layer_kinds:
        raise UsageError(f"{name} must come before strategies that own the weights: {', '.join(plan.applied)}")
    implementation = plan.training.implementation
    if implementation != "transformers":
        raise UnsupportedError(f"{name} is modelled for implementation 'transformers' only, not {implementation!r}")


def chosen_layers(plan: Plan, layers: Sequence[int] | None) -> list[int]:
    """`layers`, or all; `UsageError` for an index that the model does not have."""
    depth = len(plan.model.layers)
    last = max(layers, default=0) if layers is not None else 0
    if last >= depth:
        raise UsageError(f"'layers' to prune must be from 0 to {depth - 1} in {plan.model.name}, not {last}")
    return list(range(depth)) if layers is None else list(layers)


def operate(plan: Plan, name: str, what: str, layers: Sequence[int] | None, cut: Cut) -> Plan:
    """`plan` with `cut` made in `layers`, and one line for each way in which layers were cut.

    Raises:
        UsageError: layers that the model does not have, or a cut that leaves no whole layer.
        UnsupportedError: a model, or a layer asked for by its index, without what is pruned.
    """
    check_first(plan, name)
    model, made = plan.model, list(plan.model.layers)
    lines: dict[str, list[int]] = {}
    for index in chosen_layers(plan, layers):
        result = cut(made[index])
        if result is None and layers is not None:
            raise UnsupportedError(f"{name}: layer {index} of {model.family} {model.name} has no {what}; leave it out")
        if result is not None:
            made[index] = result[0]
            lines.setdefault(result[1], []).append(index)
    if not lines:
        raise UnsupportedError(f"{name}: {model.family} {model.name} has no {what}; leave it out")
    told = tuple(f"pruned: {line}, in layers {ranges(where)}" for line, where in lines.items())
    return attrs.evolve(plan, model=attrs.evolve(model, layers=tuple(made)), assumptions=(*plan.assumptions, *told))
