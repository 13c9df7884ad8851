"""Sequences exchanged for heads: each rank attends to whole sequences with a part of the heads."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.autograd import Autograd
from simulator.context_parallel import AXIS, WHOLE
from simulator.graph import Op, Shape, Tensor
from simulator.ops.elementwise import constant
from simulator.ops.sharded_attention.kernel import fused_backward, fused_forward
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
        kept = fused_forward(t, local, parts[0], WHOLE)
        (out,) = _exchanged(t, kept[:1], to_heads=False)
        result = t.view(out, query.shape, query.memory)
        saved = [*parts, *kept]
        t.emit(A2A, [*inputs, out, *saved], [result], saves=saved, backward=_all_to_all_backward)
    return result


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
            if 0 < turn <= count:  # the Work holds it
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
    parts = [query_part, key_part, value_part]
    fused_backward(engine, query_part, [(x, WHOLE) for x in parts])
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
