"""torch.compile of each layer by itself, as an approximation (Ansel et al., ASPLOS 2024; torchtitan compiles so).

Source: torchtitan models/llama3/infra/parallelize.py `apply_compile`; torch/_functorch/partitioners.py. What is fused
and saved follows from the layer's graph (`simulator/fusion.py`); embedding, final norm, head and loss run eagerly.
"""

from __future__ import annotations

import attrs

from hardware.errors import UnsupportedError
from simulator.model import ExpertsSpec
from simulator.plan import Plan

IMPLEMENTATIONS = ("transformers", "torchtitan")


@attrs.frozen
class CompileLayers:
    """Compile every layer: elementwise chains fuse, and a minimum cut decides what backward recomputes."""

    name: str = attrs.field(default="compile_layers", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with compiled layers; `UnsupportedError` where what the compiler would see is not modelled."""
        implementation = plan.training.implementation
        if implementation not in IMPLEMENTATIONS:
            known = " or ".join(IMPLEMENTATIONS)
            raise UnsupportedError(f"'compile' is modelled for implementation {known}, not {implementation!r}")
        if any(isinstance(layer.channel_mixer, ExpertsSpec) for layer in plan.model.layers):
            raise UnsupportedError("'compile' with a mixture of experts is not modelled: its router breaks the graph")
        line = (
            "approximate: --compile layers stands for what Inductor fuses and AOTAutograd saves; compared with what "
            "single layers save and allocate in forward, not with peaks of whole runs"
        )
        return attrs.evolve(plan, compiled=True, assumptions=(*plan.assumptions, line))
