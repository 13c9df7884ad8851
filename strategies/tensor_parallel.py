"""Tensor parallelism (Shoeybi et al., arXiv:1909.08053) as ``parallelize_module`` does it, with DTensor.

Linear layers are sharded by columns, then by rows; the vocabulary of embedding and head is sharded, too. Sequence
parallelism (Korthikanti et al., arXiv:2205.05198) shards norms and residuals along the sequence; what enters a
column-parallel layer is gathered and saved whole. Follows torchtitan/models/llama3/infra/parallelize.py.
"""

from __future__ import annotations

import math
from typing import ClassVar

import attrs

from hardware.errors import UnsupportedError
from simulator.plan import Plan
from simulator.tensor_parallel import AXIS, DTENSOR, TensorParallelism
from simulator.workload import MEGATRON
from strategies.options import flag, option

#: Optimizers whose step on DTensors was compared with recordings.
OPTIMIZERS = ("adamw", "adam", "sgd")
#: Families whose modules have the names of `simulator.tensor_parallel.PLANS`.
FAMILIES = {
    "transformers": ("llama", "gemma2"),
    "torchtitan": ("llama",),
    "torchtune": (),
    "plain": ("gpt2",),
    **dict.fromkeys(MEGATRON, ("llama", "gpt2")),
}


@attrs.frozen(kw_only=True)
class TensorParallel:
    """Shard every layer over mesh axis ``tp``; on a mesh without it nothing changes."""

    axis: ClassVar[str] = AXIS
    sequence_parallel: bool = option(False, flag, "shard norms and residuals along the sequence")
    loss_parallel: bool = option(False, flag, "compute the loss on logits sharded along the vocabulary")
    async_tp: bool = option(
        False, flag, "overlap matmuls with their collectives", "torchtitan/distributed/tensor_parallel.py"
    )
    name: str = attrs.field(default="tensor_parallel", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with its modules sharded.

        Raises:
            UnsupportedError: what is not modelled, or a model that the degree does not divide.
        """
        if self.async_tp:
            raise UnsupportedError(
                "'async_tp' true is not modelled yet (it needs torch.compile and symmetric memory); leave it out"
            )
        if plan.mesh.tp == 1:
            return plan
        self._check(plan)
        shards = TensorParallelism(sequence=self.sequence_parallel, loss=self.loss_parallel)
        return attrs.evolve(plan, tensor_parallel=shards)

    def _check(self, plan: Plan) -> None:
        implementation, family = plan.training.implementation, plan.model.family
        if plan.hooks or plan.tensor_parallel:
            raise UnsupportedError(f"{self.name!r} must come before {plan.applied[-1]}: it shards the model first")
        if plan.kept_ops:
            raise UnsupportedError(
                f"{self.name} of layers checkpointed op by op is not modelled: use full checkpointing"
            )
        if family not in FAMILIES[implementation]:
            others = [name for name, known in FAMILIES.items() if family in known]
            raise UnsupportedError(
                f"{self.name!r} of {family} is not modelled for implementation {implementation!r}; "
                f"{'use ' + ' or '.join(others) if others else 'leave it out'}"
            )
        for option_name, known in (
            ("sequence_parallel", ("torchtitan", *MEGATRON)),
            ("loss_parallel", ("torchtitan", "plain", *MEGATRON)),
        ):
            if getattr(self, option_name) and implementation not in known:
                raise UnsupportedError(
                    f"{option_name!r} needs implementation {' or '.join(known)}, not {implementation!r}: "
                    "its code does not run on shards"
                )
        _check_optimizer(plan)
        _check_clipping(plan, self.sequence_parallel)
        _check_even(plan, self.sequence_parallel)


def _check_clipping(plan: Plan, sequence: bool) -> None:
    """Without sequence parallelism norms are plain tensors, and `clip_grad_norm_` scales all by one DTensor."""
    mixed = plan.training.implementation in DTENSOR and not sequence and plan.mesh.dp_shard == 1
    if plan.training.clip is not None and mixed:
        raise UnsupportedError(
            f"'clip' {plan.training.clip} fails in torch where some weights are sharded along 'tp' and norms are not; "
            "leave it out, or use sequence_parallel or fsdp2"
        )


def _check_optimizer(plan: Plan) -> None:
    """What makes states or copies of gradients would give them the gradients' placement, not the weights'."""
    optimizer = plan.training.optimizer
    if optimizer.name not in OPTIMIZERS:
        raise UnsupportedError(
            f"optimizer {optimizer.name} on weights sharded along 'tp' is not modelled; "
            f"use one of {', '.join(OPTIMIZERS)}"
        )
    for field in ("momentum", "weight_decay") if optimizer.name != "adamw" else ():
        if getattr(optimizer, field):
            raise UnsupportedError(
                f"{field!r} of {optimizer.name} with 'tp' above 1 is not modelled: {getattr(optimizer, field)}; "
                "set it to 0 or use adamw"
            )


def _check_even(plan: Plan, sequence: bool) -> None:
    """DTensor views heads as whole ones and takes local shapes for even shards; only the vocabulary may be uneven."""
    sizes = [("sequence", plan.sequence)] if sequence else []
    for layer in dict.fromkeys(plan.model.layers):
        sizes.append(("heads", layer.attention.heads))
        shared = plan.training.implementation in MEGATRON and plan.mesh.tp % layer.attention.kv_heads == 0
        if not shared:  # Megatron-LM lets several ranks have one group
            sizes.append(("key/value heads", layer.attention.kv_heads))
        sizes.append(("feed-forward width", layer.feed_forward.width))
    for what, value in dict.fromkeys(sizes):
        if value % plan.mesh.tp:
            common = math.gcd(*(size for _, size in sizes))
            raise UnsupportedError(
                f"'tp' must divide the model's {what}: {value} / {plan.mesh.tp}; use {_nearest(common, plan.mesh.tp)}"
            )
    if plan.model.vocab < plan.mesh.tp:
        raise UnsupportedError(f"'tp' must be at most the vocabulary {plan.model.vocab}: {plan.mesh.tp}")


def _nearest(number: int, degree: int) -> str:
    """The divisors of `number` next to `degree`."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    near = [max(d for d in divisors if d < degree), *[d for d in divisors if d > degree][:1]]
    return " or ".join(map(str, near))
