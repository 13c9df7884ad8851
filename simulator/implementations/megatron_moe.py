"""Megatron-LM's mixture of experts: router, token dispatcher and experts of megatron/core/transformer/moe/.

As with ``--moe-token-dispatcher-type alltoall --moe-permute-fusion --moe-grouped-gemm`` and Transformer Engine; the
balancing loss is that of each sequence (``seq_aux_loss``). Tokens an expert has no room for are dropped, and what
room is left is padded (``--moe-pad-expert-input-to-capacity``), where there is a capacity factor; else none are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from hardware.dtypes import FP32, INT64
from hardware.errors import UnsupportedError, UsageError
from simulator import ops
from simulator.graph import Tensor, flat
from simulator.implementations.megatron_router import room, route, tokens
from simulator.model import ExpertsSpec, FeedForwardSpec, LayerSpec
from simulator.ops import megatron_moe as moe
from simulator.sizes import Dim, ceil_div, product, size_of
from simulator.trace import Trace

Axis = tuple[Dim, ...]
#: Modules in the order in which they are registered.
ORDER = ("router", "experts", "shared_experts")
Mlp = Callable[[Trace, Tensor, FeedForwardSpec, str], Tensor]


@attrs.frozen
class _Dispatch:
    """Rows that a rank sends and gets, as dimensions of one axis."""

    sent: Axis
    received: Axis
    capacity: Axis
    """Tokens of one expert from one rank; nothing where there is no capacity."""
    ranks: Axis
    local: Axis


def mixture(t: Trace, x: Tensor, spec: ExpertsSpec, family: str, mlp: Mlp) -> Tensor:
    """`MoELayer` on ``[s, b, h]``.

    Args:
        t: the trace.
        x: normalised hidden states.
        spec: of the layer.
        family: of the model, which decides how the router scores.
        mlp: the MLP of shared experts, given its name.

    Raises:
        UnsupportedError: experts of another kind, or tensor parallelism.
        UsageError: experts that the ranks cannot share evenly.
    """
    _check(t, spec)
    dispatch = _dispatch(t, spec)
    with t.call("mlp", x) as local:
        shared = None
        if spec.shared_width is not None:
            shared = local("shared_expert_output", mlp(t, x, spec.shared, "shared_experts"))
        probabilities, routing = route(t, x, spec, family)
        with t.call("token_dispatcher"):
            permuted, weights, ids = _permute(t, x, probabilities, routing, dispatch)
        local("hidden_states", permuted)
        local("probs", weights)
        arrived = local("dispatched_input", _exchanged(t, permuted, dispatch.received, dispatch))
        weights = local("probs", _exchanged(t, weights, dispatch.received, dispatch))
        out = local("output", _experts(t, arrived, weights, dispatch, spec))
        out = local("output", _exchanged(t, out, dispatch.sent, dispatch))
        with t.call("", out) as inner:
            flat_out = moe.unpermute(t, out, ids, flat(x.shape[:-1]))
            result = inner("output", ops.view(t, flat_out, x.shape))
            return result if shared is None else ops.add(t, result, shared)


def shared_buffers(t: Trace, layers: Sequence[LayerSpec]) -> None:
    """Losses of all layers that are logged, and the scale of their gradients (moe_utils.py)."""
    if any(isinstance(layer.channel_mixer, ExpertsSpec) for layer in layers):
        t.buffer("aux_losses_tracker", t.dim("L", len(layers)), dtype=FP32)
        t.buffer("main_loss_backward_scale", dtype=FP32)


def _check(t: Trace, spec: ExpertsSpec) -> None:
    ranks = t.regime.expert_parallel
    if t.regime.implementation != "megatron_te":
        raise UnsupportedError("experts are modelled with implementation megatron_te, not megatron: set that")
    if t.regime.tensor_parallel is not None:
        raise UnsupportedError("experts with tensor parallelism in Megatron-LM are not modelled yet: set 'tp' to 1")
    if not spec.gated or spec.bias or spec.latent is not None:
        raise UnsupportedError("experts that are not gated, or have biases, are not modelled with megatron_te")
    if spec.experts % ranks:
        raise UsageError(f"'ep' must divide the {spec.experts} experts: {ranks}; choose another degree")


def _dispatch(t: Trace, spec: ExpertsSpec) -> _Dispatch:
    """`MoEAlltoAllTokenDispatcher.preprocess`."""
    ranks = t.regime.expert_parallel
    count, local = tokens(t), spec.experts // ranks
    over, own = (() if n == 1 else (t.dim(name, n),) for name, n in (("ep", ranks), ("E_local", local)))
    if t.regime.capacity_factor is not None:
        each = (t.dim("C", room(t, spec)),)
        received = (*over, *own, *each)
        return _Dispatch(received, received, each, over, own)
    copies = count * spec.per_token
    most = ranks * count * min(spec.per_token, local)
    received = (t.dim("received", min(most, round(copies * (t.regime.imbalance if ranks > 1 else 1)))),)
    return _Dispatch((t.dim("sent", copies),), received, (), over, own)


# dispatch ------------------------------------------------------------------------------------------------------------


def _permute(
    t: Trace, x: Tensor, probabilities: Tensor, routing: Tensor, dispatch: _Dispatch
) -> tuple[Tensor, Tensor, Tensor]:
    """`dispatch_preprocess`: the module keeps probabilities, map and permutation until its next forward pass."""
    probabilities = moe.keep(t, probabilities, "probs")
    if dispatch.local or dispatch.capacity:
        t.buffer("num_global_tokens_per_local_expert", *routing.shape[1], dtype=INT64)
    orders = ["sort_input_by_local_experts", "restore_output_by_local_experts"]
    for name in orders if dispatch.ranks and dispatch.local else orders[:1]:  # else both are views of one
        t.buffer(name, *routing.shape[1], dtype=INT64)
    sizes = t.dimensions.bindings
    width = t.dim("2E+1", 2 * int(product(routing.shape[1], sizes)) + 1)
    blocks = (t.dim("token_blocks", ceil_div(tokens(t), moe.PERMUTATION_BLOCK)),)
    made = moe.row_ids(t, routing, width, blocks)
    with t.call("", made):  # stands for the last one, which goes when the function has returned
        ids = moe.keep(t, made, "reversed_local_input_permutation_mapping")
        rows = ops.view(t, x, (flat(x.shape[:-1]), x.shape[-1]))
        return *moe.permute(t, rows, probabilities, ids, dispatch.sent), ids


def _exchanged(t: Trace, x: Tensor, rows: Axis, dispatch: _Dispatch) -> Tensor:
    """`all_to_all` over the ranks that share the experts."""
    return moe.all_to_all(t, x, rows) if dispatch.ranks else x


def _experts(t: Trace, x: Tensor, weights: Tensor, dispatch: _Dispatch, spec: ExpertsSpec) -> Tensor:
    """`routed_experts_compute`: `TEGroupedMLP` on rows sorted by local expert, and back in the order they came."""
    with t.call("", x, weights) as local:
        with t.call("", x, weights):
            x, weights = _by_expert(t, x, weights, dispatch)
        local("dispatched_input", x)
        local("permuted_probs", weights)
        width = (t.dim("f", spec.width),)
        with t.call("experts") as inner:
            fused = inner("fc1_output", _grouped(t, "linear_fc1", x, (2, *width), spec))
            active = inner("bias_act_output", moe.weighted_swiglu(t, fused, weights, width))
            out = _grouped(t, "linear_fc2", active, x.shape[1], spec)
        out = local("expert_output", out)
        return _by_rank(t, out, dispatch)


def _grouped(t: Trace, name: str, x: Tensor, out: Axis, spec: ExpertsSpec) -> Tensor:
    """`TEGroupedLinear`: a weight for each of the rank's experts."""
    with t.call(name):
        count = spec.experts // t.regime.expert_parallel
        weights = [t.matrix(f"weight{i}", out, x.shape[1]) for i in range(count)]
        ranks = t.dim("ep", t.regime.expert_parallel)
        for weight in weights if t.regime.expert_parallel > 1 else ():
            weight.storage.whole = size_of((ranks, *weight.dims), weight.dtype.bits)
            t.graph.expert_parallel.add(weight.storage)
        return moe.grouped_linear(t, x, weights)


def _by_expert(t: Trace, x: Tensor, weights: Tensor, dispatch: _Dispatch) -> tuple[Tensor, Tensor]:
    """`dispatch_postprocess`: rows of each expert together."""
    if not dispatch.local:
        return x, weights
    if not dispatch.capacity:
        sorted_rows = moe.sort_chunks(t, x, weights)
        return sorted_rows[0], sorted_rows[1]
    axes = (dispatch.ranks, dispatch.local, dispatch.capacity)
    return _swapped(t, x, axes), _swapped(t, weights, axes)


def _by_rank(t: Trace, x: Tensor, dispatch: _Dispatch) -> Tensor:
    """`combine_preprocess`: rows of each rank together."""
    if not dispatch.local:
        return x
    if not dispatch.capacity:
        return moe.sort_chunks(t, x)[0]
    return _swapped(t, x, (dispatch.local, dispatch.ranks, dispatch.capacity))


def _swapped(t: Trace, x: Tensor, axes: tuple[Axis, Axis, Axis]) -> Tensor:
    """``x.view(first, second, capacity, ...).transpose(0, 1).contiguous().flatten(0, 2)``."""
    apart = ops.view(t, x, (*axes, *x.shape[1:]))
    together = ops.contiguous(t, ops.transpose(t, apart, 0, 1))
    return ops.view(t, together, (flat(together.shape[:3]), *x.shape[1:]))
