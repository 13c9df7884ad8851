"""LitGPT's finetuning of all weights (litgpt/finetune/full.py) with Lightning Fabric."""

from __future__ import annotations

from hardware.errors import UnsupportedError
from studies.frameworks.profile import ONE_GPU, SEVERAL_GPUS, Condition, Default, Note, Profile, Refusal

LITGPT = Profile(
    version="LitGPT 0.5.13 (June 2026), litgpt finetune_full",
    defaults=(
        Default("implementation", "transformers", "litgpt/model.py GPT is simulated as transformers' code"),
        Default("dtype", "amp-bf16", "litgpt/utils.py get_default_supported_precision: bf16-mixed"),
        Default("optimizer", "adamw,implementation=foreach", "finetune/full.py optimizer AdamW, torch's own default"),
        Default("loss", "default", "litgpt/utils.py chunked_cross_entropy is simulated as one part"),
        Default("checkpointing", "full", "finetune/full.py activation_checkpointing_policy={Block}", SEVERAL_GPUS),
        Default("checkpointing", "none", "finetune/full.py: strategy auto", ONE_GPU),
        Default(
            "strategy",
            "fsdp1,reduce_dtype=bf16",
            "finetune/full.py FSDPStrategy; lightning/fabric/plugins/precision/fsdp.py mixed_precision_config",
            SEVERAL_GPUS,
        ),
    ),
    notes=(
        Note("no comparison with a run of LitGPT stands behind this: its model and its chunked loss are not modelled"),
        Note("finetune/full.py does not clip gradients"),
    ),
    refusals=(
        Refusal(
            Condition("--task pretrain", lambda where: where.options.task == "pretrain"),
            UnsupportedError,
            "'task' pretrain of litgpt compiles the whole model, which is not modelled: leave 'framework' out",
        ),
        Refusal(
            Condition(
                "--tp, --pp, --cp or --ep",
                lambda w: any((degree or 1) > 1 for degree in (w.options.tp, w.options.pp, w.options.cp, w.options.ep)),
            ),
            UnsupportedError,
            "'framework' litgpt shards by FSDP alone in finetune_full: leave --tp, --pp, --cp and --ep out",
        ),
    ),
)
