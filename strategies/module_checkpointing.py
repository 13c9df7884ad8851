"""Checkpoint modules inside layers: feed-forwards, norms, attention (Megatron-LM's ``--recompute-modules``).

Behaviour: torch/utils/checkpoint.py `checkpoint`, around each module.
"""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError, UsageError
from simulator.graph import ATTENTION_CORE
from simulator.plan import Plan
from strategies.checkpointing import recompute_layers
from strategies.options import option, text


@attrs.frozen(kw_only=True)
class ModuleCheckpointing:
    """Recompute some modules of every layer, each a non-reentrant checkpoint of its own; the rest is saved."""

    modules: str = option("mlp", text, "names of the modules, joined by +: mlp+input_layernorm")
    name: str = attrs.field(default="checkpoint_modules", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with those modules recomputed."""
        modules = frozenset(self.modules.split("+"))
        found = {name for op in plan.graph.ops if op.slot is not None for name in _inside(op.module)}
        unknown = sorted(modules - found)
        if unknown:
            raise UsageError(
                f"'modules' must name modules of a layer: {unknown[0]!r}; there are {', '.join(sorted(found))}"
            )
        attending = {name for op in plan.graph.ops if op.part == ATTENTION_CORE for name in _inside(op.module)}
        if plan.training.autocast is not None and modules & attending:
            rule = "under autocast torch saves fewer tensors when it runs an attention module again, and stops"
            raise UnsupportedError(f"'modules' {self.modules}: {rule}; use 16-bit weights, or full checkpointing")
        return recompute_modules(plan, self.name, modules)


def refuse_modules(plan: Plan, name: str) -> None:
    """`UnsupportedError` on other code than transformers', or where ranks share the work."""
    if plan.hooks or plan.tensor_parallel is not None or plan.training.implementation != "transformers":
        raise UnsupportedError(f"{name} goes with transformers' models on one device: leave it out, or use those")


def recompute_modules(plan: Plan, name: str, modules: frozenset[str]) -> Plan:
    """`plan` with `modules` of every layer recomputed.

    Raises:
        UnsupportedError: a framework's hooks or tensor parallelism, with which this was not compared.
    """
    refuse_modules(plan, name)
    plan = recompute_layers(plan, name, range(len(plan.model.layers)))
    return attrs.evolve(plan, recomputed_modules=modules)


def _inside(path: str) -> list[str]:
    """The parts of a dotted path below the layer."""
    parts = path.split(".")
    return parts[parts.index("layer") + 1 :] if "layer" in parts else []
