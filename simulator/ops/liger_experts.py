"""Liger-Kernel's mixture of experts: gather, both products and SwiGLU in one node that keeps one activation."""

from __future__ import annotations

from hardware.dtypes import INT32
from simulator.autograd import Autograd
from simulator.graph import Op, Tensor, flat
from simulator.ops.elementwise import constant
from simulator.sizes import product
from simulator.trace import Frame, Trace

Gradients = list[Tensor | None]
#: Rows of a tile of tokens (`BLOCK_M_TOKEN`), and token copies that one program of the histogram counts (`1024`).
TILE_ROWS = 64
HISTOGRAM_TOKENS = 1024


def liger_experts(t: Trace, x: Tensor, up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """`LigerFusedMoEFunction` (ops/fused_moe.py): saves its input and what comes before the activation.

    Args:
        t: the trace.
        x: tokens ``[b s, h]``.
        up: gate and up projection of every expert, ``[E, 2 f, h]``.
        down: down projection of every expert, ``[E, h, f]``.
        indices: the experts chosen, int32 ``[b s, K]``.
        weights: their weights ``[b s, K]``.
    """
    pairs, width = flat(indices.shape), down.shape[-1]
    with t.call("") as local:
        routing = _routing(t, local, indices, up)
        before = local("pre_act", constant(t, "empty.memory_format", x, shape=(pairs, up.shape[1])))
        local("post_act", constant(t, "empty.memory_format", x, shape=(pairs, width)))
        local("Y", constant(t, "empty.memory_format", x, shape=(pairs, x.shape[1])))
        out = t.fresh("liger_experts", x.shape, x.dtype)
        saves = [x, up, down, before, weights, *routing]
        t.emit("liger_experts", [x, up, down, weights], [out], saves=saves, backward=_backward, pairs=pairs)
        t.graph.ops[-1].saves_late = True
        return out


def _routing(t: Trace, local: Frame, indices: Tensor, up: Tensor) -> list[Tensor]:
    """`compute_routing_metadata`: where each expert's tokens start, three permutations, two lists of tiles."""
    pairs, experts = flat(indices.shape), up.shape[0]
    sizes = t.dimensions.bindings
    tokens, count = (int(product(dims, sizes)) for dims in (indices.shape[0], experts))
    chosen = int(product(indices.shape[1], sizes))
    blocks = t.dim("histogram", -(-tokens // max(1, HISTOGRAM_TOKENS // (1 << (chosen - 1).bit_length()))))
    more = (t.dim("E+1", count + 1),)
    # how many tiles there are depends on the routing; here every expert is sent as many tokens
    tiles = (t.dim("tiles", count * -(-tokens * chosen // (count * TILE_ROWS))),)

    def made(name: str, *shape: tuple[str | int, ...]) -> Tensor:
        return constant(t, name, indices, dtype=INT32, shape=shape)

    with t.call("") as inner:
        inner("tile_expert_counts", made("empty.memory_format", experts, (blocks,)))
        local("_", inner("expert_token_count", made("sum.dim_IntList", experts)))
        starts = local("expert_start_idx", inner("starts", made("empty.memory_format", more)))
        inner("expert_tile_offset", made("empty.memory_format", more))
        lists = [inner(f"tiles{i}", made("empty.memory_format", tiles)) for i in range(2)]
        orders = [inner(f"order{i}", made("empty.memory_format", pairs)) for i in range(3)]
        for index, tensor in enumerate((*lists, *orders)):
            local(f"routing{index}", tensor)
    return [starts, *lists, *orders]


def _backward(engine: Autograd, op: Op, gradients: Gradients) -> Gradients:
    """All that it makes lives until it returns; the gradient of what comes before the activation is a new tensor."""
    x, up, down, weights = op.inputs
    pairs, (gradient,) = op.attributes["pairs"], gradients
    assert gradient is not None
    if not gradient.contiguous:
        gradient = engine.fresh("clone.default", x.shape, gradient.dtype)
    engine.fresh("empty.memory_format", (pairs, up.shape[1]), gradient.dtype)
    engine.fresh("empty.memory_format", (pairs, down.shape[-1]), gradient.dtype)
    for_weights = engine.fresh("zeros.default", weights.shape, gradient.dtype)
    for_down = engine.fresh("zeros_like.default", down.shape, down.dtype)
    engine.fresh("empty.memory_format", (pairs, x.shape[1]), gradient.dtype)
    for_x = engine.fresh("zeros.default", x.shape, gradient.dtype)
    for_up = engine.fresh("zeros_like.default", up.shape, up.dtype)
    return [for_x, for_up, for_down, engine.view(for_weights, weights.shape)]
