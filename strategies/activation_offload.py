"""Activation offloading: all that autograd saves waits in host memory until its node runs backward.

Technique: Rhu et al., vDNN, arXiv:1602.08124, section 3.
Behaviour: torch 2.13 torch/autograd/graph.py `save_on_cpu`, around the call of the model.
"""

from __future__ import annotations

import attrs

from simulator.plan import Plan
from strategies.options import flag, option


@attrs.frozen(kw_only=True)
class ActivationOffload:
    """``with save_on_cpu(pin_memory=True)`` around the model.

    Each saved tensor is copied by itself, a weight as well as what several ops save, when it is saved and once more in
    backward; on the device it stays only as long as something else holds it.
    """

    pin_memory: bool = option(True, flag, "copies are in pinned memory (torch's default is false)")
    name: str = attrs.field(default="activation_offload", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with everything saved on the host."""
        return attrs.evolve(plan, saved_on_host="pinned" if self.pin_memory else "pageable")
