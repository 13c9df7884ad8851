"""Attention over sequences that ranks have parts of, as Transformer Engine writes it, on ``[s, b, heads, d]``.

Source: transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py of Transformer Engine 2.11 with
fused attention (cuDNN) as kernel. Each rank has the first and the last of its turns of ``2 cp`` chunks of a sequence.
A collective that is not awaited at once is a ``Work``, which holds what it writes for as long as its Python object
lives (torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp `collective`), here until the exchange of all tensors returns.
"""

from __future__ import annotations

from collections.abc import Sequence

from hardware.dtypes import FP32, UINT64
from simulator.autograd import Autograd
from simulator.context_parallel import AXIS, WHOLE
from simulator.graph import Op, Shape, Tensor
from simulator.ops.attention import flash_dims, flash_workspace
from simulator.ops.elementwise import constant
from simulator.trace import Trace

Gradients = list[Tensor | None]

A2A = "AttnFuncWithCPAndQKVOA2A"


def all_to_all_attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`AttnFuncWithCPAndQKVOA2A` (DeepSpeed Ulysses, arXiv:2309.14509): a part of the heads on the whole sequence.

    Saves queries, keys, values and the output as the kernel sees them; what is returned is another tensor.
    """
    inputs = [query, key, value]
    with t.call("", *inputs) as local:
        parts = [local(f"part{i}", x) for i, x in enumerate(_exchanged(t, inputs, to_heads=True))]
        flash_dims(t, parts[0], WHOLE)
        kept = [local(name, x) for name, x in _kernel(t, *parts).items()]
        (out,) = _exchanged(t, kept[:1], to_heads=False)
        result = t.view(out, query.shape, query.memory)
        saved = [*parts, *kept]
        t.emit(A2A, [*inputs, out, *saved], [result], saves=saved, backward=_all_to_all_backward)
    return result


def _kernel(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """`fused_attn_fwd`: the output, fp32 log-sum-exp per query and 16 B of random state."""
    tokens, batch, heads, _ = query.shape
    return {
        "out": constant(t, "fused_attn_fwd", query),
        "softmax_lse": constant(t, "fused_attn_fwd.softmax_lse", query, dtype=FP32, shape=(batch, heads, tokens)),
        "rng_state": constant(t, "fused_attn_fwd.rng_state", query, dtype=UINT64, shape=((2,),)),
    }


def _part(t: Trace, x: Tensor) -> Shape:
    """The whole sequence of one rank's heads."""
    _, batch, heads, d = x.shape
    return t.squeezed((WHOLE, batch, (t.dimensions.split(heads, AXIS),), d))


def _exchanged(t: Trace, inputs: Sequence[Tensor], *, to_heads: bool) -> list[Tensor]:
    """`flash_attn_a2a_communicate`: each input in the order in which it is sent, received, and reordered.

    Three tensors are in flight at a time; all of them live until the last one is there.
    """
    count = len(inputs)
    received: list[Tensor] = []
    results: list[Tensor] = []
    with t.call("") as local:
        sent: list[Tensor] = []
        for turn in range(count + 2):
            if 0 < turn <= count:
                received.append(local(f"a2a_req{turn}", constant(t, "all_to_all_single", sent[turn - 1])))
            for step in ("reorder", "send") if to_heads else ("send", "reorder"):
                if step == "reorder" and turn > 1:
                    results.append(_ordered(t, received[turn - 2], inputs[turn - 2], to_heads=to_heads))
                    local(f"a2a_output{turn}", results[-1])
                if step == "send" and turn < count:
                    name = "clone.default" if to_heads else "index_select.default"
                    sent.append(local(f"a2a_input{turn}", constant(t, name, inputs[turn])))
    return results


def _ordered(t: Trace, received: Tensor, x: Tensor, *, to_heads: bool) -> Tensor:
    """Chunks in the order of the sequence, or heads next to each other."""
    if to_heads:
        return constant(t, "index_select.default", received, shape=_part(t, x))
    return constant(t, "clone.default", received)


def _all_to_all_backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """The output's gradient is exchanged, then those of queries, keys and values."""
    query, key, value, _, query_part, key_part, value_part, *_ = op.inputs
    _exchanged_back(engine, [query], [query_part], to_heads=True)
    batch, parts = query.shape[1], [query_part, key_part, value_part]
    results = [engine.prepare("fused_attn_bwd", x.shape, x.dtype) for x in parts]
    heads = query_part.shape[2], key_part.shape[2]
    workspace = flash_workspace(engine, query_part, *heads, batch=batch, queries=WHOLE)
    engine.kernel("fused_attn_bwd", results)
    engine.free(*workspace)
    found = _exchanged_back(engine, parts, [query, key, value], to_heads=False)
    return [*found, *([None] * (len(op.inputs) - 3))]


def _exchanged_back(
    engine: Autograd, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, to_heads: bool
) -> list[Tensor]:
    """`flash_attn_a2a_communicate` on gradients of tensors like `inputs`, which become such of `outputs`."""
    count = len(inputs)
    temporaries: list[Tensor] = []
    results: list[Tensor] = []
    for turn in range(count + 2):
        if 0 < turn <= count:
            sent = inputs[turn - 1]
            temporaries.append(engine.fresh("all_to_all_single", sent.shape, sent.dtype))
        for step in ("reorder", "send") if to_heads else ("send", "reorder"):
            if step == "reorder" and turn > 1:
                like = outputs[turn - 2]
                results.append(engine.fresh("reorder", like.shape, like.dtype))
            if step == "send" and turn < count:
                temporaries.append(engine.fresh("reorder", inputs[turn].shape, inputs[turn].dtype))
    engine.free(*temporaries)
    return results


def attention(t: Trace, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of a rank's queries to whole sequences, in the way that the regime names."""
    assert t.regime.context_parallel is not None
    return _WAYS[t.regime.context_parallel.communication](t, query, key, value)


_WAYS = {"a2a": all_to_all_attention}
