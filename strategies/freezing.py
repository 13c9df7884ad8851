"""Train some of the weights: the others get no gradient, no optimizer state, and nothing is saved for them.

Source: torch/nn/modules/module.py `requires_grad_`. Where all before a layer is frozen, backward ends there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.graph import Tensor
from simulator.plan import Plan
from simulator.workload import MEGATRON
from strategies.options import count, flag, option, text
from strategies.rules import owner


@attrs.frozen(kw_only=True)
class Freezing:
    """Freeze the first layers, the embeddings, and weights by name.

    Checkpointing of layers makes transformers ask for the gradient of the embedded tokens
    (transformers/modeling_utils.py `enable_input_require_grads`): then backward runs through frozen layers, too.
    """

    layers: int = option(0, count(0), "how many layers are frozen, from the first")
    embeddings: bool = option(False, flag, "freeze the tables that tokens and positions are looked up in")
    weights: str = option("", text, "freeze weights by module, name or pattern, in all layers: 'mlp+*norm*'")
    name: str = attrs.field(default="freeze", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with those weights frozen."""
        if not (self.layers or self.embeddings or self.weights):
            raise UsageError(f"{self.name} must name layers, embeddings or weights: as it is, it freezes nothing")
        most = len(plan.model.layers)
        if self.layers > most:
            raise UsageError(f"'layers' of {self.name} must be at most the model's {most} layers: {self.layers}")
        labels = tables(plan) if self.embeddings else set()
        for pattern in filter(None, self.weights.split("+")):
            labels |= matching(plan.graph.parameters, pattern)
        return freeze(plan, self.name, labels, self.layers)


def tables(plan: Plan) -> set[str]:
    """The labels of the weights that embeddings look up."""
    return {op.inputs[0].storage.label for op in plan.graph.ops if op.name == "embedding.default"}


def matching(parameters: Iterable[Tensor], pattern: str) -> set[str]:
    """The labels that a shell `pattern` matches as a whole, or a part of which between dots it matches.

    Raises:
        UsageError: none.
    """
    labels = dict.fromkeys(tensor.storage.label for tensor in parameters)
    found = {label for label in labels if any(fnmatchcase(part, pattern) for part in (label, *label.split(".")))}
    if not found:
        raise UsageError(f"'weights' must match some weight: {pattern!r}; there are {', '.join(labels)}")
    return found


def freeze(plan: Plan, name: str, labels: Collection[str], layers: int = 0) -> Plan:
    """`plan` with the weights called `labels` and those of the first `layers` frozen.

    Raises:
        UnsupportedError: Megatron-LM's own model, or weights that a strategy of data parallelism owns.
        UsageError: nothing is left to train.
    """
    if plan.training.implementation in MEGATRON:
        raise UnsupportedError(f"{name} in Megatron-LM's own code is not modelled: use another implementation")
    if owner(plan) is not None or plan.tensor_parallel is not None:
        raise UnsupportedError(f"{name} with weights shared between ranks is not modelled: use one device")
    frozen = attrs.evolve(plan, frozen=plan.frozen | frozenset(labels), frozen_layers=max(plan.frozen_layers, layers))
    if not any(tensor.requires_grad for tensor in frozen.graph.parameters):
        raise UsageError(f"{name} leaves no weight to train: freeze fewer")
    return frozen
