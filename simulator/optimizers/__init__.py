"""Optimizers: the state each keeps and the temporaries its implementation needs; one technique per file."""

from __future__ import annotations

from collections.abc import Callable

from hardware.registry import Registry
from simulator.optimizers.adafactor import adafactor
from simulator.optimizers.adafactor_hf import adafactor_hf
from simulator.optimizers.adagrad import adagrad
from simulator.optimizers.adam import adam, adamw
from simulator.optimizers.adam_mini import adam_mini
from simulator.optimizers.apollo import apollo_adamw
from simulator.optimizers.bitsandbytes import adamw_8bit, adamw_8bit_paged, adamw_paged, lion_8bit
from simulator.optimizers.galore import galore_adamw
from simulator.optimizers.lion import lion
from simulator.optimizers.muon import muon
from simulator.optimizers.rmsprop import rmsprop
from simulator.optimizers.sgd import sgd
from simulator.optimizers.step import OptimizerStep

#: An optimizer records one `step()`.
OptimizerRule = Callable[[OptimizerStep], None]

optimizers: Registry[OptimizerRule] = Registry("optimizer", "vramsim.optimizers")
for name, rule in {
    "adam": adam,
    "adamw": adamw,
    "sgd": sgd,
    "adafactor": adafactor,
    "adafactor_hf": adafactor_hf,
    "adagrad": adagrad,
    "rmsprop": rmsprop,
    "lion": lion,
    "muon": muon,
    "adamw_8bit": adamw_8bit,
    "adamw_paged": adamw_paged,
    "adamw_8bit_paged": adamw_8bit_paged,
    "lion_8bit": lion_8bit,
    "adam_mini": adam_mini,
    "galore_adamw": galore_adamw,
    "apollo_adamw": apollo_adamw,
}.items():
    optimizers.add(name, rule)
