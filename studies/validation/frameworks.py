"""The frameworks of measured runs: which settings of a row their simulation stands for, and what it takes otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from hardware.errors import UnsupportedError

#: A value of a setting that is simulated -> what of it is simulated otherwise; None where nothing is.
Known = Mapping[Any, str | None]


def _exactly(*values: Any) -> Known:
    return dict.fromkeys(values)


#: Any value: the mesh says the same, or the strategy makes nothing of it.
_ANY: Known = {}
_FLASH = {"attention": "sdpa", "sdpa_backend": "flash"}


@attrs.frozen
class Framework:
    """What a framework brings along that a row does not say, and the settings it is simulated with."""

    implementation: str
    """Whose code the model is (`simulator.workload.MODEL_IMPLEMENTATIONS`)."""
    settings: Mapping[str, Known]
    attentions: Mapping[str, Mapping[str, str]]
    """A row's ``attention`` -> fields of `Training`."""
    trainer: Mapping[str, Any]
    """Fields of `Training` that its training loop decides."""
    main_dtype: str | None = None
    """Element type of gradients, states and main weights, where it is not that of the weights."""
    losses: Mapping[str, str] = {}
    """A row's ``loss`` -> that of `Training`, where it is not the default."""
    needs: Mapping[tuple[str, Any], tuple[str, Any]] = {}
    """Settings with a value that are simulated only beside another one."""
    always: tuple[str, ...] = ()
    """Notes on every run."""

    def training(self, attention: str, loss: str) -> dict[str, Any]:
        """Fields of `Training`."""
        return {**self.trainer, **self.attentions[attention], "loss": self.losses.get(loss, "default")}

    def check(self, given: Iterable[tuple[str, Any]]) -> list[str]:
        """Notes on what is simulated otherwise.

        Raises:
            UnsupportedError: a setting that is not known, or a value of it that is not simulated.
        """
        notes, settings = list(self.always), dict(given)
        for (name, value), (other, needed) in self.needs.items():
            if settings.get(name) == value and settings.get(other) != needed:
                beside = f"{other} {json.dumps(needed)}"
                raise UnsupportedError(f"{name} {json.dumps(value)} is not simulated yet without {beside}")
        for name, value in settings.items():
            known = dict.fromkeys(self.attentions) if name == "attention" else self.settings.get(name)
            if known is _ANY or (known is None and value in (None, False)):
                continue
            if known is None:
                raise UnsupportedError(f"{name} {json.dumps(value)} is not simulated yet")
            if not any(value == each and type(value) is type(each) for each in known):
                only = ", ".join(json.dumps(each) for each in known)
                raise UnsupportedError(f"{name} {json.dumps(value)} is not simulated yet, only {only}")
            notes += [f"{name}: {known[value]}"] if known[value] else []
        return notes


#: transformers/trainer.py: `_inner_training_loop` holds the batch it iterates over through the optimizer's step;
#: `compute_loss` returns the loss alone, so the outputs go before backward. training_args.py: max_grad_norm 1.0.
HUGGING_FACE = Framework(
    implementation="transformers",
    trainer={"keep_inputs": True, "clip": 1.0},
    attentions={
        "eager": {"attention": "eager"},
        "sdpa": {"attention": "sdpa"},
        "flash_attention_2": {"attention": "flash_attention_2"},
    },
    settings={
        "strategy": _exactly("none"),
        "pp_schedule": _exactly(None),
        "loss": _exactly("hf_fp32"),
        "kernels.norm": _exactly("hf_rmsnorm fp32 upcast"),
        "kernels.rope": _exactly("hf eager"),
        "kernels.swiglu": _exactly("eager"),
        "kernels.linear": _exactly("torch"),
        "kernels.cross_entropy": {
            "torch fp32 on shifted contiguous logits": "labels are shifted, as since transformers 4.50, not logits"
        },
        "checkpointing.mode": _exactly("none", "full"),
        "checkpointing.detail": {
            None: None,
            "HF gradient_checkpointing=True; gradient_checkpointing_kwargs not set "
            "(reentrant default of transformers 4.48)": "simulated as the non-reentrant kind, which stops early",
        },
    },
    always=("gradients are clipped to norm 1.0, the Trainer's default",),
)
#: recipes/full_finetune_single_device.py: `_loss_step` drops the logits; the loop holds the batch it iterates over;
#: gradients are clipped if so configured.
TORCHTUNE = Framework(
    implementation="torchtune",
    trainer={"keep_inputs": True},
    losses={"chunked": "chunked_compiled"},
    # what a compiled layer saves is the compiler's choice, which matters less where layers are recomputed
    needs={("kernels.compile", True): ("checkpointing.mode", "full"), ("loss", "chunked"): ("kernels.compile", True)},
    attentions={"flex_attention (compiled, BlockMask)": {"attention": "flex_attention"}},
    settings={
        "strategy": _exactly("none"),
        "loss": _exactly("hf_fp32", "chunked"),
        "kernels.norm": _exactly("torchtune RMSNorm fp32 upcast"),
        "kernels.rope": _exactly("eager", "compiled"),
        "kernels.swiglu": _exactly("eager", "compiled"),
        "kernels.compile": {False: None, True: "layers are recomputed as they run without compilation"},
        "kernels.linear": _exactly("bf16"),
        "kernels.cross_entropy": _exactly(
            "F.cross_entropy on .float() logits",
            "CEWithChunkedOutputLoss 8 chunks, upcast+CE compiled per chunk",
        ),
        "checkpointing.mode": _exactly("none", "full"),
        "checkpointing.detail": _exactly(None, "per TransformerSelfAttentionLayer"),
    },
)
#: Megatron-LM's pretrain_gpt.py: the loop drops each micro-batch; gradients are clipped in place by the multi-tensor
#: kernels of Apex or Transformer Engine (megatron/core/optimizer/clip_grads.py), which allocate nothing of their size.
MEGATRON = Framework(
    implementation="megatron_te",
    trainer={},
    attentions={
        "te_fused": _FLASH,
        "te auto under deterministic mode (NVTE_ALLOW_NONDETERMINISTIC_ALGO=0): flash or cuDNN fused": _FLASH,
    },
    main_dtype="fp32",
    losses={"fused_ce": "te_fused", "vocab_parallel": "default"},
    settings={
        "strategy": _exactly("megatron_distopt"),
        "loss": _exactly("fused_ce", "vocab_parallel"),
        "strategy_options.zero_stage": _exactly(1),
        "strategy_options.dp_group_for_sharding": _ANY,
        "strategy_options.layers_per_stage": _ANY,
        "strategy_options.cp_comm_type": _exactly(None, "p2p", "a2a", "all_gather"),
        "strategy_options.layers_per_virtual_stage": _ANY,
        "pp_schedule": _exactly(None, "1F1B", "interleaved 1F1B (4 ranks x 8 chunks of 1 layer)"),
        "strategy_options.overlap_grad_reduce": _exactly(False, True),
        # gathers are in place in the buffer of weights
        "strategy_options.overlap_param_gather": _exactly(False, True),
        "strategy_options.gradient_accumulation_fusion": _exactly(False, True),
        "strategy_options.deterministic_mode": {
            True: "simulated without what deterministic kernels allocate for themselves"
        },
        # norms of vectors and counts: no tensor as big as a weight
        "strategy_options.log_params_norm": _exactly(True),
        "strategy_options.log_num_zeros_in_grad": _exactly(True),
        "kernels.norm": _exactly(
            "te_layernorm_linear (fused RMSNorm+linear where Megatron uses it)", "te LayerNorm(+linear)"
        ),
        "kernels.rope": _exactly("te_fused", None),
        "kernels.swiglu": _exactly("megatron_bias_swiglu_fusion", None),
        "kernels.gelu": _exactly("megatron bias_gelu_fusion"),
        "strategy_options.expert_dp": _ANY,
        "kernels.linear": _exactly("te_linear bf16", "te", "te_linear bf16, TE grouped GEMM for experts"),
        "kernels.bias_dropout_add": {"fused": None, "unfused": "simulated as fused"},
        "kernels.cross_entropy": _exactly("te_fused", "megatron vocab_parallel_cross_entropy fp32, unfused"),
        "checkpointing.mode": _exactly("none"),
        "checkpointing.detail": _exactly(
            None, "--recompute-granularity full --recompute-method block --recompute-num-layers 0"
        ),
    },
    always=("workspaces that cuBLAS and Transformer Engine keep are not counted",),
)
FRAMEWORKS: dict[str, Framework] = {"hf": HUGGING_FACE, "torchtune": TORCHTUNE, "megatron": MEGATRON}
