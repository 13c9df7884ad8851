"""BitFit (Ben Zaken et al., arXiv:2106.10199): train the biases alone.

Behaviour: torch/nn/modules/module.py `requires_grad_`.
"""

from __future__ import annotations

import attrs

from hardware.errors import UsageError
from simulator.plan import Plan
from strategies.freezing import freeze


@attrs.frozen
class BitFit:
    """Freeze every weight that is not a bias (section 3); a model without biases has nothing to train."""

    name: str = attrs.field(default="bitfit", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan in which biases alone are trained."""
        labels = {tensor.storage.label for tensor in plan.graph.parameters}
        others = {label for label in labels if label.rpartition(".")[2] != "bias"}
        if others == labels:
            family = plan.model.family
            raise UsageError(f"'bitfit' trains biases, of which this {family} has none: choose a model with biases")
        return freeze(plan, self.name, others)
