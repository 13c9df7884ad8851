"""transformers' Trainer: a model of transformers in the loop of `Trainer.train`."""

from __future__ import annotations

from studies.frameworks.profile import (
    SEVERAL_GPUS,
    Condition,
    Default,
    Note,
    Profile,
    Situation,
)
from studies.validation.frameworks import HUGGING_FACE as MEASURED

#: training_args.py `default_optim`: the first torch whose default is ``adamw_torch_fused``.
_FUSED_SINCE = (2, 8)
#: `accepts_loss_kwargs` is false (modeling_gemma3.py), and a loss of its own (modeling_bert.py).
_WITHOUT_ITEMS = ("gemma3", "bert")


def _passes_items(where: Situation) -> bool:
    options = where.options
    foreign = options.implementation not in (None, MEASURED.implementation)
    return where.world == 1 and options.mtp is None and not foreign and where.model.family not in _WITHOUT_ITEMS


def _recomputes(where: Situation) -> bool:
    return where.gives("checkpointing") and where.options.checkpointing != "none"


_ARGUMENTS = "training_args.py TrainingArguments"
_DDP = "torchrun: accelerate's MULTI_GPU"
HUGGING_FACE = Profile(
    version="transformers 5.23, Trainer",
    defaults=(
        Default("implementation", MEASURED.implementation, "trainer.py Trainer.__init__: the model as it is given"),
        Default("dtype", "amp-bf16", f"{_ARGUMENTS} bf16=True, over fp32 weights; without bf16 say --dtype fp32"),
        Default(
            "optimizer",
            "adamw,implementation=fused",
            "training_args.py default_optim: adamw_torch_fused with torch from 2.8 on",
            Condition("torch from 2.8 on", lambda where: where.torch >= _FUSED_SINCE),
        ),
        Default(
            "optimizer",
            "adamw,implementation=foreach",
            "training_args.py default_optim: adamw_torch with torch before 2.8",
            Condition("torch before 2.8", lambda where: where.torch < _FUSED_SINCE),
        ),
        Default("clip", MEASURED.trainer["clip"], f"{_ARGUMENTS} max_grad_norm; 0 switches it off"),
        Default("checkpointing", "none", f"{_ARGUMENTS} gradient_checkpointing=None"),
        Default("loss", "default", "trainer.py compute_loss: the model's own"),
        Default(
            "keep_inputs",
            MEASURED.trainer["keep_inputs"],
            "trainer.py _run_epoch: a batch lives until the next",
        ),
        Default(
            "items_in_batch",
            True,
            "trainer.py compute_loss, since transformers 4.46",
            Condition("one GPU, a loss that takes it", _passes_items),
        ),
        Default(
            "strategy",
            "ddp,find_unused_parameters=true",
            f"{_DDP}; trainer.py: find_unused_parameters unless layers are recomputed",
            Condition("several data-parallel ranks", lambda where: where.sharing > 1 and not _recomputes(where)),
        ),
        Default(
            "strategy",
            "ddp",
            f"{_DDP}; trainer.py: no find_unused_parameters where layers are recomputed",
            Condition("several data-parallel ranks, with checkpointing", lambda w: w.sharing > 1 and _recomputes(w)),
        ),
    ),
    notes=(
        Note(
            "from_pretrained keeps the checkpoint's element type since transformers 5: --dtype bf16 where that is all"
        ),
        Note("num_items_in_batch, which the Trainer passes, is not modelled on several GPUs", SEVERAL_GPUS),
    ),
)
