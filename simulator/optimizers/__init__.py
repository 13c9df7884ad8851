"""Optimizers: the state each keeps and the temporaries its implementation needs.

One file per optimizer; `steps` runs the one that the workload names, then `zero_grad`.
"""

from __future__ import annotations

from collections.abc import Callable

from hardware.registry import Registry
from simulator.optimizers.adam import adamw
from simulator.optimizers.step import OptimizerStep

#: An optimizer records one `step()`.
OptimizerRule = Callable[[OptimizerStep], None]

optimizers: Registry[OptimizerRule] = Registry("optimizer", "vramsim.optimizers")
optimizers.add("adamw", adamw)
