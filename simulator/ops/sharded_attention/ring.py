"""Keys and values passed round a ring of ranks (Liu et al., arXiv:2310.01889)."""

from __future__ import annotations

from hardware.dtypes import FP32
from simulator.autograd import Autograd
from simulator.context_parallel import AXIS
from simulator.graph import Op, Tensor, flat
from simulator.ops.elementwise import constant
from simulator.ops.sharded_attention.kernel import Axis, fused_backward, fused_forward, half, of_tokens
from simulator.trace import Trace

Gradients = list[Tensor | None]

P2P = "AttnFuncWithCPAndKVP2P"


def ring_attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`AttnFuncWithCPAndKVP2P`: the keys and values of every rank and the output of every step live until the end.

    A step is of all queries where the keys come from a rank before this one, of the second chunk alone where they
    come from one after it. Saves queries, the keys and values received last, the output and its log-sum-exp.
    """
    assert t.regime.context_parallel is not None
    ranks, rank = t.dimensions.bindings[AXIS], t.regime.context_parallel.rank
    with t.call("", query, key, value) as local:
        pair = ((2,), *key.shape)
        received = local("p2p_comm_buffer0", constant(t, "cat.default", key, shape=pair))
        states = []
        for step in range(int(ranks)):
            if step < ranks - 1:
                received = local(f"p2p_comm_buffer{step + 1}", constant(t, "empty_like.default", key, shape=pair))
            _, state, statistics = fused_forward(t, local, query, ("s",) if step <= rank else half(t), step)
            states.append(state)
            if step == 0:
                first = statistics
            if step == 1:
                total = local("softmax_lse", constant(t, "clone.default", first))
        out = t.fresh(P2P, query.shape, query.dtype)
        kept = [received, total, *states]
        attributes = {"ranks": ranks, "rank": rank, "half": half(t)}
        inputs = [query, key, value, *kept]
        t.emit(P2P, inputs, [out], saves=[query, *kept, out], backward=_ring_backward, **attributes)
    return out


def _ring_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Keys, values and their gradients go round together in two buffers; one of them is what both become."""
    query, key, value, received, *_ = op.inputs
    ranks, rank, chunk = op.attributes["ranks"], op.attributes["rank"], op.attributes["half"]
    if rank < ranks - 1 and any(query.shape[1:3]):  # of a single row it is a view
        engine.fresh("clone.default", (query.shape[1], query.shape[2], chunk), FP32)
    for_query = engine.fresh("empty_like.default", query.shape, query.dtype)
    buffers = [engine.fresh("empty.memory_format", ((2,), *received.shape), key.dtype) for _ in range(2)]
    results: list[Tensor] = []
    for step in range(ranks):
        engine.free(*results)
        queries, keys = _sections(step, ranks, rank, chunk)
        results = fused_backward(engine, query, [(query, queries), (key, keys), (value, keys)])
    last = buffers[ranks % 2]
    views = [engine.view(last, x.shape, flat(of_tokens(x, x.shape[0]))) for x in (key, value)]
    return [for_query, *views, *([None] * (len(op.inputs) - 3))]


def _sections(step: int, ranks: int, rank: int, chunk: Axis) -> tuple[Axis, Axis]:
    """Tokens of queries and of keys in a step of backward, which goes through forward's from the last."""
    whole: Axis = ("s",)
    if step == ranks - 1:
        return whole, whole
    return (whole, chunk) if step >= ranks - rank - 1 else (chunk, whole)
