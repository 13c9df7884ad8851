"""Lightning attention (Qin et al., arXiv:2401.04658): linear attention, block by block, with a decaying state.

Follows `MiniMaxLightningAttention` (models/minimax/modeling_minimax.py).
"""

from __future__ import annotations

import attrs

from simulator import ops
from simulator.blocks.feed_forward import activation
from simulator.blocks.linear import projection
from simulator.blocks.norms import llama_rms_norm
from simulator.graph import Tensor
from simulator.model import LightningSpec
from simulator.ops.matmul import Axis
from simulator.sizes import ceil_div
from simulator.trace import Frame, Trace

#: Turns of the loop over blocks that are built: the first, whose state needs no gradient, and the last three, which
#: in backward find other buffers. Those between are like the first of these three.
BUILT_TURNS = 4


@attrs.frozen
class Decays:
    """A layer's buffers: how fast each head forgets, and what that makes of distances inside a block."""

    slope: Tensor
    query: Tensor
    key: Tensor
    diagonal: Tensor


def lightning_attention(t: Trace, x: Tensor, mask: Tensor | None, spec: LightningSpec, caller: Frame) -> Tensor:
    """`MiniMaxLightningAttention`.

    Args:
        t: the trace.
        x: hidden states ``[b, s, h]``.
        mask: 1 for tokens and 0 for padding, ``[b, s]``; None where there is none.
        spec: of the layer.
        caller: the frame of the layer, which keeps the state after the last block.
    """
    heads, dim = (t.dim("a_lightning", spec.heads),), (t.dim("d_lightning", spec.head_dim),)
    all_three = (t.dim("qkv_lightning", 3 * spec.head_dim),)
    with t.call("self_attn", x) as local:
        decays = _buffers(t, spec, heads)
        rows = x.shape[:2]
        mixed = projection(t, "qkv_proj", x, heads + all_three, False)
        mixed = local("qkv_states", activation(t, spec.activation, mixed))
        if mask is not None:
            mixed = local("qkv_states", ops.mask_rows(t, mixed, mask))
        mixed = local("qkv_states", ops.view(t, mixed, (*rows, heads, all_three)))
        parts = ops.split(t, mixed, (*rows, heads, dim), 3)
        query, key, value = (ops.transpose(t, part, 1, 2) for part in parts)
        for name, part in (("query_states", query), ("key_states", key), ("value_states", value)):
            local(name, part)
        out = _over_blocks(t, Blocks(query, key, value, decays), spec.block, local, caller)
        out = local("attn_output", ops.transpose(t, out, 1, 2))
        out = local("attn_output", ops.reshape(t, out, (*rows, heads + dim)))
        out = local("attn_output", llama_rms_norm(t, "norm", out))
        with t.call("", out) as inner:
            gate = inner("gate", ops.sigmoid(t, projection(t, "output_gate", x, heads + dim, False)))
            out = local("attn_output", ops.mul(t, gate, out))
        return projection(t, "out_proj", out, ("h",), False)


def _buffers(t: Trace, spec: LightningSpec, heads: Axis) -> Decays:
    block, low = t.dim("block", spec.block), t.regime.weights
    slope = t.buffer("slope_rate", *heads, dtype=low)
    slope.shape = t.squeezed((heads, (), ()))
    query, key = (t.buffer(f"{name}_decay", *heads, block, dtype=low) for name in ("query", "key"))
    for each in (query, key):
        each.shape = t.squeezed((heads, (block,), ()))
    diagonal = t.buffer("diagonal_decay", *heads, block, t.dim("block", spec.block), dtype=low)
    diagonal.shape = t.squeezed(((), heads, (block,), (block,)))
    return Decays(slope, query, key, diagonal)


@attrs.frozen
class Blocks:
    """What every turn of the loop reads."""

    query: Tensor
    key: Tensor
    value: Tensor
    """``[b, heads, s, d]``, each a part of one tensor."""
    decays: Decays

    def run(self, t: Trace, state: Tensor, rows: Axis, local: Frame) -> Tensor:
        """The output of one block ``[b, heads, rows, d]``: what it attends to inside, and what it reads of `state`."""
        query, key, value = (self._cut(t, name, x, rows, local) for name, x in self._states())
        self._block_decay(t, local)
        inside = local("attn_weights_intra", ops.matmul(t, query, ops.transpose(t, key, 2, 3)))
        diagonal = attrs.evolve(self.decays.diagonal, shape=t.squeezed(((), *inside.shape[1:])))
        with t.call("", decayed := ops.mul(t, inside, diagonal)):
            inside = local("attn_output_intra", ops.matmul(t, decayed, value))
        with t.call("", decayed := _decayed(t, query, self.decays.query, rows)):
            between = local("attn_output_inter", ops.matmul(t, decayed, state))
        return local("current_attn_output", ops.add(t, between, inside))

    def next_state(self, t: Trace, state: Tensor, rows: Axis, local: Frame) -> Tensor:
        """The state after a block: decayed, and with its keys and values."""
        key, value = local.held("current_key_states"), local.held("current_value_states")
        faded = ops.transpose(t, _decayed(t, key, self.decays.key, rows), 2, 3)
        with t.call("", faded):
            added = local("next_attn_weights_inter", ops.matmul(t, faded, value))
        return ops.add(t, ops.mul(t, state, local.held("block_decay")), added)

    def _states(self) -> tuple[tuple[str, Tensor], ...]:
        return ("query", self.query), ("key", self.key), ("value", self.value)

    def _cut(self, t: Trace, name: str, x: Tensor, rows: Axis, local: Frame) -> Tensor:
        """One block of a sequence; the only one is the sequence itself."""
        whole = t.squeezed((rows,)) == x.shape[2:3]
        return local(f"current_{name}_states", x if whole else ops.block(t, x, rows, 2))

    def _block_decay(self, t: Trace, local: Frame) -> None:
        rate = ops.constant(t, "mul.Tensor", ops.constant(t, "neg.default", self.decays.slope))
        with t.call("", rate):
            local("block_decay", ops.constant(t, "exp.default", ops.wide(t, rate)))


def _decayed(t: Trace, x: Tensor, decay: Tensor, rows: Axis) -> Tensor:
    """``x * decay`` of as many rows as a block has."""
    out = ops.mul(t, x, attrs.evolve(decay, shape=t.squeezed((decay.shape[0], rows, ()))))
    out.memory = tuple(dim for dim in out.memory if dim in out.dims)  # of a part it is no part
    return out


def _over_blocks(t: Trace, blocks: Blocks, block: int, local: Frame, caller: Frame) -> Tensor:
    """The loop over blocks: few of its turns are built, the others save what these do."""
    tokens = int(t.dimensions.bindings["s"])
    count = ceil_div(tokens, block)
    built = min(count, BUILT_TURNS)
    rows = [(t.dim("block", block),)] * (built - 1)
    rows.append((t.dim("last_block", tokens - (count - 1) * block),) if count > 1 else ("s",))
    shape = (blocks.query.shape[0], blocks.query.shape[1], blocks.query.shape[3], blocks.query.shape[3])
    outputs: list[Tensor] = []
    begins: list[int] = []
    others = None
    hidden = t.dim("other_blocks", max(count - built, 1))
    state = local("attn_weights_inter", ops.constant(t, "zeros.default", blocks.value, shape=shape))
    with t.call("") as listed:
        for turn in range(built):
            if turn == 1 and count > built:
                state, others = ops.other_turns(t, state)
                outputs.append(listed("attn_output.others", ops.listed(t, outputs[0], hidden)))
            begins.append(len(t.graph.ops))
            outputs.append(listed(f"attn_output.{turn}", blocks.run(t, state, rows[turn], local)))
            update = len(t.graph.ops)
            state = local("attn_weights_inter", blocks.next_state(t, state, rows[turn], local))
        if others is not None:
            ops.repeat_turn(t, others, t.graph.ops[begins[1] : begins[2]], hidden)
        caller("_", state)
        ops.unread(t, t.graph.ops[update:], caller)
        return local("attn_output", ops.joined(t, outputs, 2, ("s",)))
