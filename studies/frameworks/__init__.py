"""What frameworks do by default, by name: ``--framework``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hardware.errors import unknown_name
from studies.frameworks.deepspeed import DEEPSPEED
from studies.frameworks.hugging_face import HUGGING_FACE
from studies.frameworks.litgpt import LITGPT
from studies.frameworks.megatron import MEGATRON
from studies.frameworks.profile import Profile, Situation, fill
from studies.frameworks.torchtitan import TORCHTITAN

if TYPE_CHECKING:
    from simulator.model import ModelSpec
    from studies.options import TrainingOptions

PROFILES: dict[str, Profile] = {
    "hf": HUGGING_FACE,
    "deepspeed": DEEPSPEED,
    "torchtitan": TORCHTITAN,
    "megatron": MEGATRON,
    "litgpt": LITGPT,
}


def with_framework(
    options: TrainingOptions, model: ModelSpec, world: int, torch: tuple[int, int]
) -> tuple[TrainingOptions, tuple[str, ...]]:
    """`options` with those left out as their framework has them, and a line for each, with its source.

    Raises:
        UsageError: an unknown framework, or one that asks for a choice that was not made.
        UnsupportedError: what the framework does there is not modelled.
    """
    name = str(options.framework)
    if name not in PROFILES:
        raise unknown_name("framework", name, PROFILES)
    filled, lines = fill(PROFILES[name], Situation(options, model, world, torch))
    return filled, (f"--framework {name}: {PROFILES[name].version}", *lines)
