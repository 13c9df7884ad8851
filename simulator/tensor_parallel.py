"""What tensor parallelism does to each module, in the words of ``torch.distributed.tensor.parallel``.

A recipe stays code for one device: the blocks it is made of look up here, by name, which style a module has, and
dimensions that a style shards are bound to one rank's share (`Trace.shard`). A tensor sharded along the sequence is
one whose sequence dimension is ``s/tp``; what is partial is reduced by the module that makes it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import attrs

#: The mesh axis.
AXIS = "tp"


class Style(enum.Enum):
    """A style of torch/distributed/tensor/parallel/style.py, and what it shards."""

    COLUMN = "ColwiseParallel"
    """A linear layer's output features; its input is replicated."""
    ROW = "RowwiseParallel"
    """A linear layer's input features; its output is partial and is reduced."""
    VOCABULARY = "RowwiseParallel of an embedding"
    """The rows of a table of embeddings; its output is partial and is reduced."""
    HEAD = "ColwiseParallel with gathered or sharded logits"
    """The vocabulary of the head."""
    SEQUENCE = "SequenceParallel"
    """Nothing but the sequence: weights are replicated, so their gradients are partial."""
    INPUT = "PrepareModuleInput"
    """A module whose input is gathered along the sequence once, for all linear layers in it."""


_ENDS = {"tok_embeddings": Style.VOCABULARY, "output": Style.HEAD}
_TORCHTITAN = {
    **_ENDS,
    **dict.fromkeys(("wq", "wk", "wv", "w1", "w3"), Style.COLUMN),
    **dict.fromkeys(("wo", "w2"), Style.ROW),
    **dict.fromkeys(("attention_norm", "ffn_norm", "norm"), Style.SEQUENCE),
    **dict.fromkeys(("attention", "feed_forward"), Style.INPUT),
}
_PLAIN = {
    **_ENDS,
    **dict.fromkeys(("qkv", "fc1"), Style.COLUMN),
    **dict.fromkeys(("proj", "fc2"), Style.ROW),
    **dict.fromkeys(("ln1", "ln2", "norm"), Style.SEQUENCE),
}
_MEGATRON = {
    "word_embeddings": Style.VOCABULARY,
    "output_layer": Style.HEAD,
    **dict.fromkeys(("linear_qkv", "linear_fc1"), Style.COLUMN),
    **dict.fromkeys(("linear_proj", "linear_fc2"), Style.ROW),
}
_TRANSFORMERS = {
    "embed_tokens": Style.VOCABULARY,
    "lm_head": Style.HEAD,
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), Style.COLUMN),
    **dict.fromkeys(("o_proj", "down_proj"), Style.ROW),
}
#: Implementation -> module -> style: torchtitan/models/llama3/infra/parallelize.py (commit b5bcd76c6), the same for a
#: plain GPT, and `LlamaConfig.base_model_tp_plan` of transformers 5.23 with torchtitan's styles for both ends.
PLANS: Mapping[str, Mapping[str, Style]] = {
    "torchtitan": _TORCHTITAN,
    "plain": _PLAIN,
    "transformers": _TRANSFORMERS,
    "megatron": _MEGATRON,
    "megatron_te": _MEGATRON,
}
#: Implementations whose shards are DTensors; Megatron-LM's are plain tensors.
DTENSOR = ("torchtitan", "plain", "transformers")


@attrs.frozen
class TensorParallelism:
    """How the modules of one model are sharded along ``tp``."""

    sequence: bool = False
    """Whether norms and residuals are sharded along the sequence."""
    loss: bool = False
    """Whether the loss is computed on logits sharded along the vocabulary."""

    def style(self, implementation: str, module: str) -> Style | None:
        """The style of `module`; None leaves it as it is."""
        style = PLANS[implementation].get(module)
        return style if self.sequence or style not in (Style.SEQUENCE, Style.INPUT) else None
