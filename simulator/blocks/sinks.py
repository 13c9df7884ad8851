"""Attention with sinks: each head may attend to nothing (gpt-oss, arXiv:2508.10925, section 2.2)."""

from __future__ import annotations

from simulator import ops
from simulator.blocks.attention import repeat_kv
from simulator.graph import ATTENTION_CORE, Tensor, flat
from simulator.model import AttentionSpec
from simulator.trace import Trace


def attention_with_sinks(
    t: Trace, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, spec: AttentionSpec
) -> tuple[Tensor, Tensor]:
    """`eager_attention_forward` (models/gpt_oss/modeling_gpt_oss.py).

    Each head has one more logit, which takes part in the softmax and is dropped.
    """
    sinks = t.vector("sinks", query.shape[1])
    with t.part(ATTENTION_CORE), t.call("", query, key, value) as local:
        key = local("key_states", repeat_kv(t, key, query.shape[1]))
        value = local("value_states", repeat_kv(t, value, query.shape[1]))
        weights = local("attn_weights", ops.mul_scalar(t, ops.matmul(t, query, ops.transpose(t, key, 2, 3))))
        assert mask is not None
        weights = local("attn_weights", ops.add(t, weights, mask))
        column = ops.expand(t, ops.view(t, sinks, ((), query.shape[1], (), ())), (*query.shape[:3], ()))
        wider = (*query.shape[:3], (t.dim("s+1", t.dimensions.bindings["s"] + 1),))
        logits = local("combined_logits", ops.cat(t, [weights, column], wider, flat(wider)))
        with t.call("") as inner:
            largest, indices = ops.largest(t, logits)
            inner("largest", largest)
            inner("indices", indices)
            logits = local("combined_logits", ops.sub(t, logits, largest))
        probabilities = local("probs", ops.softmax(t, logits, logits.dtype))
        scores = local("scores", ops.narrow(t, probabilities, weights.shape))
        weights = local("attn_weights", ops.to(t, ops.dropout(t, scores, spec.dropout), value.dtype))
        output = ops.transpose(t, ops.matmul(t, weights, value), 1, 2)
        return ops.contiguous(t, output), weights
