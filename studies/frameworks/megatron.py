"""Megatron-LM's pretrain_gpt.py in bf16, with Transformer Engine."""

from __future__ import annotations

from studies.frameworks.profile import ALWAYS, Condition, Default, Note, Profile, Situation
from studies.validation.frameworks import MEGATRON as MEASURED


def _flash(where: Situation) -> bool:
    """Whether the kernel can be Transformer Engine's fused one."""
    attends = any(layer.attends for layer in where.model.layers)
    return attends and where.options.attention in (None, "sdpa") and where.options.dtype in (None, "bf16", "fp16")


_FUSED = MEASURED.attentions["te_fused"]
_FLASH = Condition("16-bit weights and sdpa", _flash)
MEGATRON = Profile(
    version="Megatron-LM at d98e8a64 (August 2026), pretrain_gpt.py --bf16 --use-distributed-optimizer",
    defaults=(
        Default("implementation", MEASURED.implementation, "core/transformer/transformer_config.py transformer_impl"),
        Default("dtype", "bf16", "training/arguments.py --bf16, which has to be given"),
        Default(
            "attention", _FUSED["attention"], "core/extensions/transformer_engine.py TEDotProductAttention", _FLASH
        ),
        Default(
            "sdpa_backend", _FUSED["sdpa_backend"], "--attention-backend auto: flash or cuDNN's fused kernel", _FLASH
        ),
        Default(
            "optimizer",
            "adamw,implementation=fused",
            "core/optimizer/__init__.py: FusedAdam of Transformer Engine; optimizer_config.py: adam, decoupled decay",
        ),
        Default("clip", 1.0, "core/optimizer/optimizer_config.py clip_grad; 0 switches it off"),
        Default("checkpointing", "none", "core/transformer/transformer_config.py recompute_granularity=None"),
        Default(
            "loss",
            "default",
            "core/model_parallel_config.py cross_entropy_loss_fusion=False: vocabulary-parallel, unfused",
        ),
        Default(
            "strategy",
            "megatron_distributed_optimizer,use_distributed_optimizer=true,grad_reduce_in_fp32=true,"
            "gradient_accumulation_fusion=true",
            "training/arguments.py: --use-distributed-optimizer, which has to be given; validate_args: fp32 main "
            "gradients with bf16; --no-gradient-accumulation-fusion is not given",
        ),
    ),
    notes=(
        Note("the vocabulary is padded to a multiple of 128 x tp (training/vocab_utils.py)", ALWAYS),
        Note("dropout is that of the model's config: Megatron-LM's own is 0.1 unless --hidden-dropout says otherwise"),
        *(Note(text) for text in MEASURED.always),
    ),
)
