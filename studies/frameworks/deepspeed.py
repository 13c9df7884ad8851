"""DeepSpeed's engine around a model of transformers: what a configuration file leaves out."""

from __future__ import annotations

from hardware.errors import UnsupportedError, UsageError
from studies.frameworks.profile import ONE_GPU, Condition, Default, Note, Profile, Refusal, Situation


def _no_stage(where: Situation) -> bool:
    return where.sharing > 1 and not where.names_data_parallelism()


DEEPSPEED = Profile(
    version="DeepSpeed 0.19.8, DeepSpeedEngine with bf16 enabled",
    defaults=(
        Default("implementation", "transformers", "runtime/engine.py DeepSpeedEngine: the model as it is given"),
        Default("dtype", "bf16", "runtime/precision_config.py: bf16.enabled, which a configuration has to set"),
        Default(
            "optimizer",
            "adamw,implementation=fused",
            "runtime/engine.py get_optimizer_configuration: FusedAdam for type Adam or AdamW, which has to be set",
        ),
        Default("clip", 1.0, "runtime/constants.py GRADIENT_CLIPPING_DEFAULT of 0.19.8; 0 switches it off"),
        Default(
            "checkpointing", "none", "runtime/activation_checkpointing/config.py: only what the model calls itself"
        ),
        Default("loss", "default", "runtime/engine.py forward: the model's own"),
    ),
    notes=(
        Note("options of ZeRO are those of the strategy, whose defaults are DeepSpeed's own (runtime/zero/config.py)"),
    ),
    refusals=(
        Refusal(
            ONE_GPU,
            UnsupportedError,
            "'framework' deepspeed on one GPU is not modelled; give --gpus a count, e.g. 8xh100-80",
        ),
        Refusal(
            Condition("several data-parallel ranks without --strategy", _no_stage),
            UsageError,
            "'strategy' must be given with framework deepspeed, whose own zero stage is 0 (runtime/zero/config.py), "
            "not modelled: deepspeed_zero1, deepspeed_zero2 or deepspeed_zero3",
        ),
    ),
)
