"""What is done with a model: the training step's options, each one that changes memory."""

from __future__ import annotations

import attrs

from hardware.dtypes import FP16, FP32, DType
from hardware.errors import UnsupportedError, UsageError
from simulator.liger import Liger
from simulator.optimizer import IMPLEMENTATIONS as IMPLEMENTATIONS
from simulator.optimizer import ONE_DEVICE as ONE_DEVICE
from simulator.optimizer import OPTIONS as OPTIONS
from simulator.optimizer import PAGED as PAGED
from simulator.optimizer import SCALE_TYPES as SCALE_TYPES
from simulator.optimizer import WHOLE_WEIGHTS as WHOLE_WEIGHTS
from simulator.optimizer import Optimizer as Optimizer
from simulator.optimizer import check_count, check_name

#: What transformers' integrations/moe.py offers without further packages; the first is its default on a GPU.
EXPERTS = ("grouped_mm", "eager", "batched_mm")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention")
SDPA_BACKENDS = ("auto", "flash", "efficient", "math")
ATTENTION_MASKS = ("none", "full", "padded")
ZERO_GRADS = ("none", "zero")
#: The models of Megatron-LM, with its own modules or with Transformer Engine's.
MEGATRON = ("megatron", "megatron_te")
#: transformers' own, the Llamas of torchtitan and torchtune, a GPT in plain PyTorch, and Megatron-LM's models.
MODEL_IMPLEMENTATIONS = ("transformers", "torchtitan", "torchtune", "plain", *MEGATRON)
#: The model's own loss, and others -> the implementations that have them.
LOSSES: dict[str, tuple[str, ...]] = {"default": MODEL_IMPLEMENTATIONS, "te_fused": MEGATRON}
LOSSES |= dict.fromkeys(("chunked", "chunked_compiled"), ("torchtune",))

#: Bounds that make a slip of the keyboard visible; byte counts may still exceed 64 bits.
LARGEST_MICRO_BATCH = 2**20
LARGEST_SEQ_LEN = 2**24
LARGEST_ACCUMULATION = 2**20
LARGEST_MTP = 2**4
LARGEST_CAPACITY = 2**20


@attrs.frozen(kw_only=True)
class Training:
    """One optimizer step of training on one device; every field changes memory.

    Raises:
        UsageError: a field outside its bounds, or a name that no table holds.
    """

    micro_batch: int = 1
    seq_len: int = 1024
    gradient_accumulation: int = 1
    weights: DType = FP32
    """Element type of parameters, gradients and optimizer state."""
    autocast: DType | None = None
    """Element type of ``torch.autocast``; it goes with fp32 weights."""
    optimizer: Optimizer = attrs.field(factory=Optimizer)
    attention: str = "sdpa"
    """transformers' ``attn_implementation``."""
    sdpa_backend: str = "auto"
    attention_mask: str = "none"
    """``none``, ``full`` (given, but nothing is padded) or ``padded``."""
    keep_outputs: bool = False
    """Whether the caller's frame holds the model's outputs through backward."""
    keep_inputs: bool = False
    """Whether the caller's frame holds one batch from step to step, the optimizer included."""
    clip: float | None = None
    """Largest global norm of the gradients (``clip_grad_norm_``); None does not clip."""
    zero_grad: str = "none"
    """``none`` (``set_to_none=True``) or ``zero``."""
    experts: str = "grouped_mm"
    """transformers' ``experts_implementation`` of models with mixtures of experts."""
    expert_imbalance: float = 1.0
    """How many times the mean number of tokens the busiest expert gets; sizes of ``eager`` depend on it alone."""
    capacity_factor: float | None = None
    """Tokens that each expert has room for over the mean, in Megatron-LM; further ones are dropped, missing ones are
    padded. None drops no token."""
    grad_scaler: bool = False
    """Whether ``torch.amp.GradScaler`` scales the loss and unscales the gradients, which goes with fp16."""
    optimizer_in_backward: bool = False
    """Whether a hook runs each parameter's own optimizer as soon as its gradient is there, and frees the gradient."""
    implementation: str = "transformers"
    """Whose code of the model is run; each family has some of `MODEL_IMPLEMENTATIONS`."""
    loss: str = "default"
    """The model's own, ``te_fused`` (Transformer Engine's kernel, in Megatron-LM), or ``chunked`` and
    ``chunked_compiled`` (torchtune's `CEWithChunkedOutputLoss`)."""
    torch: tuple[int, int] = (2, 13)
    """Version whose behaviour is simulated."""
    fused_activation_backward: bool = True
    """False for torch builds without CUDA's fused `silu_backward` (fake-tensor runs on CPU builds)."""
    any_sdpa_backend: bool = False
    """True for fake-tensor runs, where the kernel that `sdpa_backend` names takes any input."""
    fused_norm: bool = True
    """False for torch builds without CUDA's fused `rms_norm` (as above)."""
    tensor_subclasses: bool = False
    """True for fake-tensor runs: some of torch's backward formulas spare tensor subclasses their in-place ops."""
    liger: Liger = attrs.field(factory=Liger)
    """Kernels of Liger-Kernel that the model runs in place of PyTorch's ops."""
    items_in_batch: bool = False
    """Whether ``num_items_in_batch`` is passed (transformers' Trainer since 4.46): the summed loss is divided by it."""
    mtp: int = 0
    """Modules that predict further tokens (multi-token prediction) and are trained with the model."""
    kernel_workspace: bool = True
    """Count what kernels allocate for themselves (flash attention's backward accumulators)."""

    def __attrs_post_init__(self) -> None:
        check_count("micro_batch", self.micro_batch, LARGEST_MICRO_BATCH)
        check_count("seq_len", self.seq_len, LARGEST_SEQ_LEN)
        check_count("gradient_accumulation", self.gradient_accumulation, LARGEST_ACCUMULATION)
        self._check_mtp()
        check_name("attention", self.attention, ATTENTIONS)
        check_name("experts", self.experts, EXPERTS)
        if not 1 <= self.expert_imbalance < float("inf"):
            raise UsageError(f"'expert_imbalance' must be a number >= 1: {self.expert_imbalance!r}")
        if self.expert_imbalance > 1 and self.experts != "eager" and self.implementation not in MEGATRON:
            raise UsageError(f"'expert_imbalance' changes no size with experts {self.experts}: leave it out")
        if self.capacity_factor is not None:
            self._check_capacity(self.capacity_factor)
        check_name("sdpa_backend", self.sdpa_backend, SDPA_BACKENDS)
        check_name("attention_mask", self.attention_mask, ATTENTION_MASKS)
        check_name("zero_grad", self.zero_grad, ZERO_GRADS)
        check_name("implementation", self.implementation, MODEL_IMPLEMENTATIONS)
        check_name("loss", self.loss, tuple(LOSSES))
        if self.implementation not in LOSSES[self.loss]:
            raise UsageError(
                f"'loss' {self.loss} goes with implementation {' or '.join(LOSSES[self.loss])}; set that, too"
            )
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise UsageError(f"'clip' must be a finite number > 0: {self.clip}; leave it out not to clip")
        self._check_patches()
        if self.grad_scaler:
            self._check_grad_scaler()
        if self.optimizer_in_backward:
            self._check_optimizer_in_backward()
        if self.autocast is not None and self.weights != FP32:
            raise UsageError(f"'autocast' goes with fp32 weights, not {self.weights}: choose one of the two")

    def _check_capacity(self, factor: float) -> None:
        if not 0 < factor <= LARGEST_CAPACITY:
            limits = f"above 0 and at most {LARGEST_CAPACITY}"
            raise UsageError(f"'capacity_factor' must be {limits}: {factor}; leave it out to drop no token")
        if self.implementation not in MEGATRON:
            raise UsageError(f"'capacity_factor' goes with implementation megatron_te, not {self.implementation}")
        if self.expert_imbalance > 1:
            raise UsageError("'expert_imbalance' changes no size with 'capacity_factor': leave one of the two out")

    def _check_mtp(self) -> None:
        if self.mtp == 0:
            return
        check_count("mtp", self.mtp, LARGEST_MTP)
        amid = {
            f"implementation {self.implementation}": self.implementation != "transformers",
            "liger": bool(self.liger.kernels),
            "items_in_batch": self.items_in_batch,
        }
        for what in (what for what, given in amid.items() if given):
            raise UnsupportedError(f"'mtp' with {what} is not modelled: leave one out")

    def _check_grad_scaler(self) -> None:
        """What `GradScaler` refuses (torch/amp/grad_scaler.py `_unscale_grads_`), and what is not modelled of it."""
        if FP16 not in (self.autocast, self.weights):
            raise UsageError("'grad_scaler' is for fp16: set 'autocast' to fp16, or leave it out")
        if self.weights == FP16 and (self.optimizer.implementation != "fused" or self.clip is not None):
            way_out = "set 'autocast' to fp16 with fp32 weights, or 'implementation' to fused and no 'clip'"
            raise UsageError(f"'grad_scaler' does not unscale the gradients of fp16 weights: {way_out}")
        if self.optimizer_in_backward:
            raise UsageError("'grad_scaler' unscales gradients after backward: leave 'optimizer_in_backward' out")
        if self.optimizer.name == "muon" or self.implementation in MEGATRON:
            with_what = "muon" if self.optimizer.name == "muon" else self.implementation
            raise UnsupportedError(f"'grad_scaler' with {with_what} is not modelled: leave it out")

    def _check_optimizer_in_backward(self) -> None:
        """Each gradient is gone before the next is there: nothing can be summed over or kept."""
        fails = "'optimizer_in_backward' frees each gradient within backward"
        if self.gradient_accumulation > 1:
            raise UsageError(f"{fails}, so none can accumulate: set 'gradient_accumulation' to 1")
        if self.clip is not None:
            raise UsageError(f"{fails}, so there is no global norm: leave 'clip' out")
        if self.implementation in MEGATRON:
            raise UnsupportedError(f"'optimizer_in_backward' with {self.implementation} is not modelled: leave it out")
        if self.zero_grad != "none":
            raise UsageError(f"{fails}, so none is set to zero: leave 'zero_grad' at none")

    def _check_patches(self) -> None:
        for field, given in (("liger", self.liger.kernels), ("items_in_batch", self.items_in_batch)):
            if given and self.implementation != "transformers":
                raise UnsupportedError(
                    f"{field!r} goes with implementation transformers, not {self.implementation!r}: leave one out"
                )
