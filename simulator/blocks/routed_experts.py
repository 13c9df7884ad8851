"""Experts: every token through those chosen for it, in each way of transformers' ``experts_implementation``."""

from __future__ import annotations

from hardware.dtypes import INT32
from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks.expert_loop import looped_experts
from simulator.blocks.feed_forward import SILU, activation
from simulator.blocks.forms import PLAIN, Form, Sizes, expert_weights, projections
from simulator.graph import Tensor, flat
from simulator.model import ExpertsSpec
from simulator.sizes import Dim, product
from simulator.trace import Frame, Trace


def routed_experts(
    t: Trace, x: Tensor, weights: Tensor, indices: Tensor, spec: ExpertsSpec, form: Form = PLAIN
) -> Tensor:
    """Tokens ``[tokens, h]`` through the experts `indices` ``[tokens, K]``, as ``experts_implementation`` names."""
    if t.regime.liger.swiglu:
        return _fused_experts(t, x, weights, indices, spec)
    ways = {"grouped_mm": _grouped_experts, "batched_mm": _batched_experts, "eager": looped_experts}
    return ways[t.regime.experts](t, x, weights, indices, spec, form)


def _fused_experts(t: Trace, x: Tensor, weights: Tensor, indices: Tensor, spec: ExpertsSpec) -> Tensor:
    """`LigerExperts` (liger_kernel/transformers/swiglu.py)."""
    if spec.activation not in SILU:
        raise UnsupportedError(f"'liger' swiglu computes silu, not {spec.activation} as this model: leave swiglu out")
    with t.call("experts", x, indices, weights) as local:
        up, down = (expert_weights(t, name, sizes, spec, PLAIN) for name, sizes in projections(t, x, spec))
        indices = local("top_k_index_2d", ops.constant(t, "_to_copy.default", indices, dtype=INT32))
        return local("out", ops.liger_experts(t, x, up, down, indices, weights))


def _grouped_experts(t: Trace, x: Tensor, weights: Tensor, indices: Tensor, spec: ExpertsSpec, form: Form) -> Tensor:
    """`grouped_mm_experts_forward` (integrations/moe.py): token copies sorted by expert, one product for all experts.

    How many tokens an expert is sent decides no size: all copies together are tokens times `per_token`.
    """
    _check_aligned(t, x, spec)
    pairs, experts, width = flat(indices.shape), (t.dim("E", spec.experts),), (t.dim("f", spec.width),)
    with t.call("experts", x, indices, weights) as local:
        sample_weights = local("sample_weights", ops.reshape(t, weights, (pairs,)))
        ids, permutation = ops.sort(t, local("expert_ids", ops.reshape(t, indices, (pairs,))))
        local("expert_ids_g", ids)
        local("perm", permutation)
        with t.call("") as inner:
            sources = inner("sources", ops.constant(t, "floor_divide.default", permutation))
            rows = local("selected_hidden_states_g", ops.index(t, x, sources))
        sample_weights = local("sample_weights_g", ops.index(t, sample_weights, permutation))
        offsets = ops.group_ends(t, ids, experts)
        ends = [local(f"offsets{i}", each) for i, each in enumerate(offsets)][-1]
        out = rows
        for name, sizes in projections(t, x, spec):
            bias = _own_bias(t, name, sizes, ids, spec, local)
            weight = expert_weights(t, name, sizes, spec, form)
            out = local("proj_out", _grouped_linear(t, out, weight, ends, bias, form))
            if name != "down_proj":
                out = local("proj_out", _between(t, out, width, spec, form))
        weighted = local("weighted_out", _weighted(t, out, sample_weights))
        inverse = local("inv_perm", ops.inverse_permutation(t, permutation))
        weighted = local("weighted_out", ops.index(t, weighted, inverse))
        return _sum(t, x, weighted, indices, local)


def _grouped_linear(t: Trace, x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """`_grouped_linear`: rows of all experts at once, and `bias` in place."""
    out = ops.grouped_linear(t, x, weight, ends, transposed=form.transposed)
    return out if bias is None else ops.add_into(t, out, bias)


def _batched_experts(t: Trace, x: Tensor, weights: Tensor, indices: Tensor, spec: ExpertsSpec, form: Form) -> Tensor:
    """`batched_mm_experts_forward` (integrations/moe.py): every token copy is multiplied by its own copy of weights."""
    pairs, width = flat(indices.shape), (t.dim("f", spec.width),)
    with t.call("experts", x, indices, weights) as local:
        copies = ops.clone(t, x, (x.shape[0], indices.shape[1], x.shape[-1]))
        rows = local("selected_hidden_states", ops.view(t, copies, (pairs, x.shape[-1])))
        sample_weights = local("sample_weights", ops.reshape(t, weights, (pairs,)))
        ids = local("expert_ids", ops.reshape(t, indices, (pairs,)))
        out = rows
        for name, sizes in projections(t, x, spec):
            weight = expert_weights(t, name, sizes, spec, form)
            weight = local("selected_weights", ops.index(t, weight, ids))
            bias = _own_bias(t, name, sizes, ids, spec, local)
            out = local("proj_out", _batched_linear(t, out, weight, bias, form))
            if name != "down_proj":
                out = local("proj_out", _between(t, out, width, spec, form))
        weighted = local("weighted_out", _weighted(t, out, sample_weights))
        return _sum(t, x, weighted, indices, local)


def _batched_linear(t: Trace, x: Tensor, weight: Tensor, bias: Tensor | None, form: Form) -> Tensor:
    """`_batched_linear`: one product per row."""
    rows, width = x.shape
    with t.call(""):
        if form.transposed:
            out = ops.autocast_bmm(t, ops.view(t, x, (rows, (), width)), weight)
        else:
            out = ops.autocast_bmm(t, weight, ops.view(t, x, (rows, width, ())))
        out = ops.view(t, out, (rows, weight.shape[2 if form.transposed else 1]))
        return out if bias is None else ops.add_into_view(t, out, bias)


def _between(t: Trace, x: Tensor, width: tuple[Dim, ...], spec: ExpertsSpec, form: Form) -> Tensor:
    """What the projections up make, as it goes down."""
    return form.gate(t, x, width, spec) if spec.gated else activation(t, spec.activation, x)


def _own_bias(t: Trace, name: str, sizes: Sizes, ids: Tensor, spec: ExpertsSpec, local: Frame) -> Tensor | None:
    """``bias[ids]``: for every row that of its expert."""
    if not spec.bias:
        return None
    biases = t.weights(f"{name}_bias", (t.dim("E", spec.experts),), sizes[1])
    return local("selected_biases", ops.index(t, biases, ids))


def _weighted(t: Trace, out: Tensor, sample_weights: Tensor) -> Tensor:
    with t.call("") as local:
        column = local("column", ops.reshape(t, sample_weights, (sample_weights.shape[0], ())))
        return ops.mul(t, out, column)


def _sum(t: Trace, x: Tensor, weighted: Tensor, indices: Tensor, local: Frame) -> Tensor:
    parts = ops.reshape(t, weighted, (x.shape[0], indices.shape[1], x.shape[-1]))
    out = local("final_hidden_states", ops.sum_axis(t, parts, 1))
    return ops.to(t, out, x.dtype)


def _check_aligned(t: Trace, x: Tensor, spec: ExpertsSpec) -> None:
    """Refuse rows that `torch._grouped_mm` does (aten/src/ATen/native/GroupedMMUtils.h: strides of whole 16 bytes)."""
    elements = 16 * 8 // t.regime.weights.bits
    hidden = product(x.shape[-1], t.dimensions.bindings)
    for name, size in (("hidden", hidden), ("width", spec.width)):
        if size % elements:
            raise UnsupportedError(
                f"'experts' grouped_mm takes rows of whole 16 bytes: {name} must be a multiple of {elements} with "
                f"weights of {t.regime.weights.name}, not {size}"
            )
