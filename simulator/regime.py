"""How a forward pass is run: what a recipe must know besides the model."""

from __future__ import annotations

import attrs

from hardware.dtypes import DType
from simulator.context_parallel import ContextParallelism
from simulator.liger import Liger
from simulator.tensor_parallel import TensorParallelism


@attrs.frozen
class Regime:
    """How a forward pass is run: everything a recipe must know besides the model itself."""

    weights: DType
    autocast: DType | None = None
    attention: str = "sdpa"
    sdpa_backend: str = "auto"
    experts: str = "grouped_mm"
    imbalance: float = 1.0
    capacity_factor: float | None = None
    """Tokens each expert has room for over the mean; None drops no token."""
    expert_parallel: int = 1
    """Ranks that share the experts."""
    torch: tuple[int, int] = (2, 13)
    training: bool = True
    implementation: str = "transformers"
    attention_mask: str = "none"
    fused_activation_backward: bool = True
    fused_norm: bool = True
    tensor_subclasses: bool = False
    loss_division: bool = False
    """Whether the caller divides the loss by the number of micro-batches."""
    keep_inputs: bool = False
    any_sdpa_backend: bool = False
    cast_inputs: bool = False
    """Whether a framework casts each layer's floating-point arguments to the weights' element type."""
    tensor_parallel: TensorParallelism | None = None
    context_parallel: ContextParallelism | None = None
    scaled_loss: bool = False
    """Whether a framework's engine divides the loss by the number of micro-batches and multiplies it by a scale."""
    loss: str = "default"
    memory_efficient_linear: bool = False
    """Whether a framework replaces ``torch.nn.functional.linear`` by one that saves the weight itself."""
    liger: Liger = attrs.field(factory=Liger)
    """Kernels of Liger-Kernel in place of torch's ops."""
    items_in_batch: bool = False
    """Whether the caller passes ``num_items_in_batch``, by which the model divides a summed loss."""
    embeddings_require_grad: bool = False
    """Whether a hook makes the embedded tokens require a gradient, even of a frozen table."""
    float8: str | None = None
    """How linear layers that run on float8 copies are scaled: ``tensorwise`` or ``rowwise``."""
    pipelined: bool = False
    """Whether the batch of a whole step is there from its beginning, of which micro-batches are views."""
