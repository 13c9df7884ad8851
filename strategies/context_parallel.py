"""Context parallelism: ranks along ``cp`` share each sequence, and exchange what attention needs of the rest.

Ways of exchange: sequences for heads (DeepSpeed Ulysses, Jacobs et al., arXiv:2309.14509), keys and values in a ring
(Liu et al., arXiv:2310.01889), or keys and values gathered. With causal masks each rank has two chunks of a
sequence, one from either end, so that all have the same work.
"""

from __future__ import annotations

import math
from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError
from simulator.context_parallel import AXIS, ContextParallelism
from simulator.ops.attention import FLASH_DIM_STEP, FLASH_MAX_HEAD_DIM
from simulator.plan import Plan
from strategies.options import choice, option
from strategies.rules import owner

#: Implementation -> what ranks may exchange, the default first: of torch's ring attention, how keys and values go
#: round (`set_rotate_method`).
COMMUNICATIONS = {"megatron_te": ("p2p", "a2a", "all_gather"), "transformers": ("all_gather", "a2a")}
DEFAULT = "default"
#: Families of transformers whose ring attention was compared with recordings.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: Chunks of a sequence that each rank has.
CHUNKS = 2


@attrs.frozen(kw_only=True)
class ContextParallel:
    """Shard every sequence over mesh axis ``cp``; on a mesh without it nothing changes."""

    axis: ClassVar[str] = AXIS
    communication: str = option(
        DEFAULT,
        choice(DEFAULT, "p2p", "a2a", "all_gather"),
        "Megatron-LM's p2p (ring, its default), a2a (sequences for heads) or all_gather; torch's ring by all_gather "
        "(its default) or a2a",
        "megatron/training/arguments.py; torch.distributed.tensor.experimental",
    )
    name: str = attrs.field(default="context_parallel", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with its sequences sharded.

        Raises:
            UnsupportedError: what is not modelled, or a sequence or heads that the degree does not divide.
        """
        if plan.mesh.cp == 1:
            return plan
        communication = self._communication(plan)
        _check_sequence(plan)
        if plan.training.implementation == "transformers":
            _check_ring(plan)
        elif communication == "a2a":
            _check_heads(plan, plan.mesh.cp)
        return attrs.evolve(plan, context_parallel=ContextParallelism(communication, plan.rank % plan.mesh.cp))

    def _communication(self, plan: Plan) -> str:
        implementation = plan.training.implementation
        first = owner(plan)
        if first is not None or plan.context_parallel:
            raise UnsupportedError(f"{self.name!r} must come before {plan.applied[-1]}: it shards the sequence first")
        known = COMMUNICATIONS.get(implementation)
        if known is None:
            raise UnsupportedError(
                f"{self.name!r} is not modelled for implementation {implementation!r}; "
                f"use {' or '.join(COMMUNICATIONS)}"
            )
        if self.communication == DEFAULT:
            return known[0]
        if self.communication not in known:
            raise UnsupportedError(
                f"'communication' must be {' or '.join(known)} with implementation {implementation!r}: "
                f"{self.communication!r}"
            )
        return self.communication


def _check_sequence(plan: Plan) -> None:
    """Every rank has two chunks of equal length; with sequence parallelism the ranks along ``tp`` share them."""
    length = plan.training.seq_len
    shared = plan.tensor_parallel is not None and plan.tensor_parallel.sequence
    multiple = math.lcm(CHUNKS, plan.mesh.tp if shared else 1)
    divisor = multiple * plan.mesh.cp
    if length % divisor:
        ranks = f"{multiple} x cp {plan.mesh.cp}"
        below, above = length // divisor * divisor, -(-length // divisor) * divisor
        way = f"{below} or {above}" if below else str(above)
        raise UnsupportedError(f"'seq_len' must be a multiple of {ranks} = {divisor}: {length}; use {way}")


def _check_heads(plan: Plan, cp: int) -> None:
    """`AttnFuncWithCPAndQKVOA2A` asserts that heads are divided evenly."""
    for layer in (each for each in dict.fromkeys(plan.model.layers) if each.attends):
        for what, heads in (("heads", layer.attention.heads), ("key/value heads", layer.attention.kv_heads)):
            own = -(-heads // plan.mesh.tp)
            if own % cp:
                raise UnsupportedError(
                    f"'cp' must divide the {what} of a rank with communication a2a: {own} / {cp}; "
                    "use a smaller cp or tp"
                )


def _check_ring(plan: Plan) -> None:
    """Torch shards `scaled_dot_product_attention`, causal and without a mask, of which the flash kernel is modelled."""
    training, model = plan.training, plan.model
    others = {
        "'tp' above 1": plan.tensor_parallel is not None,
        "'liger'": bool(training.liger.kernels),
        "'items_in_batch'": training.items_in_batch,
        "'float8'": plan.float8 is not None,
        "'compile'": plan.compiled,
    }
    for name in (name for name, given in others.items() if given):
        raise UnsupportedError(
            f"{name} with 'cp' above 1 is not modelled for implementation 'transformers': leave one of the two out"
        )
    if model.family not in FAMILIES:
        raise UnsupportedError(f"'cp' above 1 of {model.family} is not modelled; use {' or '.join(FAMILIES)}, or cp 1")
    if training.attention != "sdpa" or training.attention_mask != "none":
        raise UnsupportedError(
            f"'attention' must be sdpa without a mask with 'cp' above 1, the only one that torch shards here: "
            f"{training.attention}, padding {training.attention_mask}"
        )
    if training.sdpa_backend not in ("auto", "flash"):
        raise UnsupportedError("'sdpa_backend' must be auto or flash with 'cp' above 1: the others are not modelled")
    if training.autocast is not None:
        raise UnsupportedError("'autocast' with 'cp' above 1 is not modelled: use fsdp2 with param_dtype=bf16")
    for layer in dict.fromkeys(model.layers):
        if layer.attention.window is not None:
            raise UnsupportedError("'cp' above 1 needs full attention: this model has layers with a sliding window")
        if layer.attention.head_dim % FLASH_DIM_STEP or layer.attention.head_dim > FLASH_MAX_HEAD_DIM:
            raise UnsupportedError(
                f"'cp' above 1 needs a head dimension that the flash kernel takes as it is, a multiple of "
                f"{FLASH_DIM_STEP} up to {FLASH_MAX_HEAD_DIM}: {layer.attention.head_dim}"
            )
