"""Attention over sequences that ranks have parts of, on ``[s, b, heads, d]``: Transformer Engine's three ways.

Source: transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py of Transformer Engine 2.11 with
fused attention (cuDNN) as kernel. Each rank has two chunks of a sequence, one from either end. A function that is
compiled there (``jit_fuser``) is one kernel that allocates its result alone. A collective that is not awaited at once
is a ``Work``, which holds what it writes for as long as its Python object lives
(torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp `collective`).
"""

from __future__ import annotations

from simulator.graph import Tensor
from simulator.ops.sharded_attention.all_to_all import all_to_all_attention
from simulator.ops.sharded_attention.gathered import gathered_attention
from simulator.ops.sharded_attention.ring import ring_attention
from simulator.trace import Trace

_WAYS = {"a2a": all_to_all_attention, "p2p": ring_attention, "all_gather": gathered_attention}


def attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of a rank's queries to whole sequences, in the way that the regime names."""
    assert t.regime.context_parallel is not None
    return _WAYS[t.regime.context_parallel.communication](t, query, key, value)
