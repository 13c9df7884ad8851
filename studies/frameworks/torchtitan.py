"""torchtitan's `Trainer`, with the defaults of its Config and of the recipes for Llama 3."""

from __future__ import annotations

from hardware.errors import UnsupportedError
from studies.frameworks.profile import (
    ALWAYS,
    ONE_GPU,
    SEVERAL_RANKS,
    Condition,
    Default,
    Note,
    Profile,
    Refusal,
    Situation,
)

_MIXED = "fsdp2,param_dtype=bf16,reduce_dtype=fp32"
_FSDP = "distributed/fsdp.py apply_fsdp_to_decoder; config/configs.py mixed_precision_param, mixed_precision_reduce"


def _wraps_outside(where: Situation) -> bool:
    """Whether embedding and head are units of their own: one weight cannot be in two; in stages they always are."""
    return where.sharing > 1 and not where.model.tied_embeddings and (where.options.pp or 1) == 1


def _tensor_parallel(where: Situation) -> bool:
    return (where.options.tp or 1) > 1


_OUTSIDE = Condition("several data-parallel ranks, untied, no pipeline", _wraps_outside)
_INSIDE = Condition(SEVERAL_RANKS.text, lambda where: where.sharing > 1 and not _wraps_outside(where))
TORCHTITAN = Profile(
    version="torchtitan at b5bcd76c (August 2026), Trainer",
    defaults=(
        Default("implementation", "torchtitan", "models/llama3/model.py"),
        Default(
            "dtype",
            "amp-bf16",
            "distributed/utils.py maybe_enable_amp, until #2900 of April 2026: autocast where nothing is sharded",
            ONE_GPU,
        ),
        Default("dtype", "fp32", "config/configs.py TrainingConfig.dtype"),
        Default(
            "optimizer",
            "adamw,implementation=fused",
            "components/optimizer/optimizer.py Config.implementation, fused since February 2025 (#881)",
        ),
        Default("clip", 1.0, "config/configs.py max_norm"),
        Default(
            "checkpointing",
            "ops",
            "trainer.py Trainer.Config.activation_checkpoint: SelectiveAC since June 2026 (#3674), "
            "before it selective_ac_option 2, --checkpoint-every 2",
        ),
        Default("loss", "default", "components/loss.py CrossEntropyLoss"),
        Default("compile", "none", "config/configs.py CompileConfig.enable"),
        Default(
            "strategy",
            "tensor_parallel,sequence_parallel=true,loss_parallel=true",
            "config/configs.py enable_sequence_parallel; models/llama3/sharding.py",
            Condition("--tp above 1", _tensor_parallel),
        ),
        Default("strategy", f"{_MIXED},wrap=layer+embedding+head", _FSDP, _OUTSIDE),
        Default("strategy", _MIXED, _FSDP, _INSIDE),
    ),
    notes=(
        Note(
            "the loss is simulated on whole logits: the chunks of torchtitan's recipes (ChunkedLossWrapper, since "
            "April 2026) are not modelled",
            ALWAYS,
        ),
        Note("fully_shard over one rank, which torchtitan has since April 2026, is simulated as autocast", ONE_GPU),
        Note("final norm and head are simulated as freed after forward; torchtitan keeps them gathered", _OUTSIDE),
    ),
    refusals=(
        Refusal(
            Condition(
                "--tp above 1 without --checkpointing",
                lambda where: _tensor_parallel(where) and not where.gives("checkpointing"),
            ),
            UnsupportedError,
            "'checkpointing' ops, the default of torchtitan, is not modelled for tensor-parallel layers: "
            "give --checkpointing full or none",
        ),
    ),
)
