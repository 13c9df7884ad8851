"""Keys and values gathered from all ranks (Llama 3, arXiv:2407.21783, section 3.3.2)."""

from __future__ import annotations

from hardware.dtypes import INT32
from simulator.autograd import Autograd
from simulator.context_parallel import AXIS, WHOLE
from simulator.graph import Op, Tensor
from simulator.ops.elementwise import constant
from simulator.ops.sharded_attention.kernel import Axis, fused_backward, fused_forward, half, of_tokens
from simulator.trace import Trace

Gradients = list[Tensor | None]

GATHERED = "AttnFuncWithCPAndKVAllGather"


def gathered_attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`AttnFuncWithCPAndKVAllGather`: each chunk attends to all tokens up to its end.

    Saves what it was given and the output of either chunk; what is returned is a copy of those. Backward gathers anew.
    """
    with t.call("", query, key, value) as local:
        chunk = half(t)
        starts = ((t.dim("b+1", t.dimensions.bindings["b"] + 1),),)
        lengths = local("cu_seqlens_q", constant(t, "floor_divide.default", query, dtype=INT32, shape=starts))
        with t.call("") as gathering:
            for name, x in (("k_ag", key), ("v_ag", value)):
                gathering(name, constant(t, "all_gather", x, shape=t.squeezed(of_tokens(x, WHOLE))))
            for name, x in (("k_ag", key), ("v_ag", value)):
                ordered = constant(t, "index_select.default", x, shape=t.squeezed(of_tokens(x, WHOLE)))
                gathering(name, local(name, ordered))
        out = local("out", constant(t, "empty_like.default", query))
        kept = [each for number in range(2) for each in fused_forward(t, local, query, chunk, number)]
        result = t.view(out, query.shape, query.memory)
        saved = [query, key, value, lengths, *kept]
        attributes = {"half": chunk, "ends": _ends(t)}
        t.emit(GATHERED, [query, key, value, out, *saved[3:]], [result], saves=saved, backward=_backward, **attributes)
    return result


def _ends(t: Trace) -> list[Axis]:
    """`get_kv_seq_info_after_all_gather`: the tokens up to the end of this rank's first and of its second chunk."""
    assert t.regime.context_parallel is not None
    ranks, rank = t.dimensions.bindings[AXIS], t.regime.context_parallel.rank
    counts = (rank + 1, 2 * ranks - rank)
    return [(t.dim(f"chunks{i}", count), *half(t)) for i, count in enumerate(counts)]


def _backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """Gradients of gathered keys and values are summed over both chunks, put in order and scattered."""
    query, key, value, *_ = op.inputs
    for_query = engine.fresh("empty_like.default", query.shape, query.dtype)
    pair = (key, value)
    totals = [engine.fresh("zeros.default", of_tokens(x, WHOLE), x.dtype) for x in pair]
    gathered = [engine.fresh("all_gather", of_tokens(x, WHOLE), x.dtype) for x in pair]
    for x, whole in zip(pair, gathered, strict=True):
        engine.fresh("index_select.default", of_tokens(x, WHOLE), x.dtype)
        engine.free(whole)
    for end in op.attributes["ends"]:
        fused_backward(engine, query, [(query, op.attributes["half"]), (key, end), (value, end)])
    ordered = []
    for x, total in zip(pair, totals, strict=True):
        ordered.append(engine.fresh("index_select.default", of_tokens(x, WHOLE), x.dtype))
        engine.free(total)
    results = []
    for x, whole in zip(pair, ordered, strict=True):
        results.append(engine.fresh("reduce_scatter", x.shape, x.dtype))
        engine.free(whole)
    return [for_query, *results, *([None] * (len(op.inputs) - 3))]
