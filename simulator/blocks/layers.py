"""A decoder layer: token mixer and channel mixer, each on a branch of the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from simulator import ops
from simulator.blocks.attention import rotary_attention
from simulator.blocks.feed_forward import Feed, gated_mlp
from simulator.blocks.heads import Norm
from simulator.graph import Tensor
from simulator.model import LayerSpec
from simulator.trace import Trace

#: Hidden states, rotary tables, mask and token mixer to its output, and to the weights that attention leaves.
Attend = Callable[..., tuple[Tensor, Tensor | None]]

#: Names of the norms in front of the two halves of a layer, and of those behind them.
BEFORE = ("input_layernorm", "post_attention_layernorm")
AROUND = ("input_layernorm", "pre_feedforward_layernorm")
"""Of those in front, where there are some behind, too (Gemma)."""
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
NONE = (None, None)
Names = tuple[str, str] | tuple[None, None]


def decoder_layer(
    t: Trace,
    x: Tensor,
    tables: tuple[Tensor, ...],
    mask: Tensor | None,
    layer: LayerSpec,
    *,
    norm: Norm,
    before: Names = BEFORE,
    after: Names = NONE,
    attend: Attend = rotary_attention,
    feed: Feed = gated_mlp,
    branch: Callable[[Trace, Tensor], Tensor] | None = None,
) -> Tensor:
    """`LlamaDecoderLayer` (models/llama/modeling_llama.py) and what differs from it by the place of its norms.

    Args:
        norm: of the family.
        before: names of the norms in front of attention and MLP.
        after: names of those behind them (models/olmo2/modeling_olmo2.py, models/gemma2/modeling_gemma2.py).
        attend, feed: the two halves.
        branch: what happens to the output of a half before it is added (dropout, a multiplier).
    """
    with t.call("layer", x) as local:
        hidden = local("hidden", norm(t, before[0], x)) if before[0] else x
        hidden, weights = attend(t, hidden, tables, mask, layer.token_mixer)
        local("hidden", hidden)
        if weights is not None:
            local("_", weights)
        hidden = local("hidden", norm(t, after[0], hidden)) if after[0] else hidden
        residual = local("residual", local("hidden", ops.add(t, x, branch(t, hidden) if branch else hidden)))
        hidden = local("hidden", norm(t, before[1], residual)) if before[1] else residual
        hidden = local("hidden", feed(t, hidden, layer.feed_forward))
        hidden = local("hidden", norm(t, after[1], hidden)) if after[1] else hidden
        return ops.add(t, residual, branch(t, hidden) if branch else hidden)
