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
from simulator.plan import Plan
from strategies.options import choice, option
from strategies.rules import owner

#: Implementation -> what ranks may exchange.
COMMUNICATIONS = {"megatron_te": ("p2p", "a2a", "all_gather")}
#: Chunks of a sequence that each rank has.
CHUNKS = 2


@attrs.frozen(kw_only=True)
class ContextParallel:
    """Shard every sequence over mesh axis ``cp``; on a mesh without it nothing changes."""

    axis: ClassVar[str] = AXIS
    communication: str = option(
        "p2p",
        choice("p2p", "a2a", "all_gather"),
        "what ranks exchange: keys and values in a ring (p2p) or gathered, or sequences for heads (a2a)",
        "megatron/training/arguments.py",
    )
    name: str = attrs.field(default="context_parallel", init=False)

    def __call__(self, plan: Plan) -> Plan:
        """The plan with its sequences sharded.

        Raises:
            UnsupportedError: what is not modelled, or a sequence or heads that the degree does not divide.
        """
        if plan.mesh.cp == 1:
            return plan
        self._check(plan)
        return attrs.evolve(plan, context_parallel=ContextParallelism(self.communication, plan.rank % plan.mesh.cp))

    def _check(self, plan: Plan) -> None:
        implementation, cp = plan.training.implementation, plan.mesh.cp
        first = owner(plan)
        if first is not None or plan.context_parallel:
            raise UnsupportedError(f"{self.name!r} must come before {plan.applied[-1]}: it shards the sequence first")
        known = COMMUNICATIONS.get(implementation)
        if known is None:
            raise UnsupportedError(
                f"{self.name!r} is not modelled for implementation {implementation!r}; "
                f"use {' or '.join(COMMUNICATIONS)}"
            )
        if self.communication not in known:
            raise UnsupportedError(
                f"'communication' must be {' or '.join(known)} with implementation {implementation!r}: "
                f"{self.communication!r}"
            )
        _check_sequence(plan)
        if self.communication == "a2a":
            _check_heads(plan, cp)


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
    for layer in dict.fromkeys(plan.model.layers):
        for what, heads in (("heads", layer.attention.heads), ("key/value heads", layer.attention.kv_heads)):
            own = -(-heads // plan.mesh.tp)
            if own % cp:
                raise UnsupportedError(
                    f"'cp' must divide the {what} of a rank with communication a2a: {own} / {cp}; "
                    "use a smaller cp or tp"
                )
