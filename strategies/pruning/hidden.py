"""Pruning of the residual stream (Sheared LLaMA, arXiv:2310.06694, section 2.1): fewer channels in every layer.

They go from embedding, norms, head and every projection's side that faces the stream; heads and MLPs stay as wide.
"""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator.plan import Plan
from strategies.pruning.amount import Amount, to_amount
from strategies.pruning.surgery import check_first


@attrs.frozen
class PruneHidden:
    """Remove channels from the hidden states of the whole model."""

    amount: Amount = attrs.field(converter=to_amount)
    name: str = attrs.field(default="prune_hidden", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan of the model without them; `UnsupportedError` where embeddings have a width of their own."""
        check_first(plan, self.name)
        model = plan.model
        if model.embedding_width is not None:
            raise UnsupportedError(f"{self.name}: embeddings of {model.name} are projected to hidden; leave it out")
        removed = self.amount.of(model.hidden, 1, "hidden")
        line = f"pruned: {removed} of {model.hidden} channels of the hidden states"
        fewer = attrs.evolve(model, hidden=model.hidden - removed)
        return attrs.evolve(plan, model=fewer, assumptions=(*plan.assumptions, line))
