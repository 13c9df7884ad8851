"""Experts one after the other: the loop that transformers' ``experts_implementation`` eager runs.

Each expert gathers its own tokens, so how evenly they are routed decides sizes; all copies together are tokens times
experts per token, whatever the routing. Experts without a token take no turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from hardware.dtypes import BOOL, INT64
from simulator import ops
from simulator.blocks.feed_forward import activation
from simulator.blocks.forms import Form, expert_weights, projections
from simulator.graph import Tensor
from simulator.model import ExpertsSpec
from simulator.sizes import Dim, product
from simulator.trace import Frame, Trace

#: Turns of the loop that are built: the first, and the last three, which in backward find other gradient buffers.
BUILT_TURNS = 4


@attrs.frozen
class Routing:
    """How many tokens each expert that has some is sent.

    The busiest comes first: what it saved is there when backward, which runs the other way, adds the second expert's
    gradients of all weights to the first's. Elsewhere in the order it makes a lower peak.
    """

    turns: int
    """Experts that have tokens."""
    most: int
    each: int
    """Of all but the busiest and the last."""
    last: int


def route(tokens: int, per_token: int, experts: int, imbalance: float) -> Routing:
    """`per_token` copies of `tokens` over `experts`: one gets `imbalance` times the mean, the others share the rest."""
    copies = tokens * per_token
    most = min(tokens, max(1, round(imbalance * copies / experts)))
    others = min(experts - 1, copies - most)
    if others == 0:
        return Routing(1, most, most, most)
    each, rest = divmod(copies - most, others)
    return Routing(others + 1, most, each, each + rest)


def looped_experts(t: Trace, x: Tensor, weights: Tensor, indices: Tensor, spec: ExpertsSpec, form: Form) -> Tensor:
    """`MixtralExperts.forward` (models/mixtral/modeling_mixtral.py), `GptOssExperts.forward`.

    Args:
        t: the trace.
        x: tokens ``[tokens, h]``.
        weights, indices: of the experts chosen, ``[tokens, K]``.
        spec: of the layer.
        form: how the family spells its experts.
    """
    sizes = t.dimensions.bindings
    tokens, chosen = int(product(x.shape[0], sizes)), int(product(indices.shape[1], sizes))
    routing = route(tokens, chosen, spec.experts, t.regime.imbalance)
    matrices = {name: expert_weights(t, name, each, spec, form) for name, each in projections(t, x, spec)}
    biases = _biases(t, x, spec)
    with t.call("experts", x, indices, weights) as local:
        out = local("final_hidden_states", ops.constant(t, "zeros_like.default", x))
        _hits(t, indices, spec, form, routing, local)
        return _loop(t, out, routing, _Turn(x, weights, matrices, biases, spec, form), local)


def _biases(t: Trace, x: Tensor, spec: ExpertsSpec) -> dict[str, Tensor]:
    if not spec.bias:
        return {}
    experts = (t.dim("E", spec.experts),)
    return {name: t.weights(f"{name}_bias", experts, each[1]) for name, each in projections(t, x, spec)}


def _hits(t: Trace, indices: Tensor, spec: ExpertsSpec, form: Form, routing: Routing, local: Frame) -> None:
    """Which token goes where, one-hot in int64, and the experts that have tokens."""
    classes = (t.dim("E+1", spec.experts + 1),) if form.masked else (t.dim("E", spec.experts),)
    mask = ops.constant(t, "zeros.default", indices, dtype=INT64, shape=(*indices.shape, classes))
    local("expert_mask", mask)
    with t.call("") as inner:
        counts = ops.constant(t, "sum.dim_IntList", mask, shape=(classes,))
        with t.call("", counts):
            hit = inner("hit", ops.constant(t, "gt.Scalar", counts, dtype=BOOL))
        found = (t.dim("E_hit", routing.turns),)
        local("expert_hit", ops.constant(t, "nonzero.default", hit, dtype=INT64, shape=(found,)))


@attrs.frozen
class _Turn:
    """What every turn of the loop reads."""

    x: Tensor
    weights: Tensor
    matrices: dict[str, Tensor]
    biases: dict[str, Tensor]
    spec: ExpertsSpec
    form: Form

    def run(self, t: Trace, out: Tensor, rows: Dim, local: Frame) -> Tensor:
        """One expert on its `rows` tokens, added into `out`."""
        pairs = ops.constant(t, "nonzero.default", self.x, dtype=INT64, shape=((rows,), (2,)))
        ids = local("token_idx", t.view(pairs, ((rows,),), (rows, 2)))
        state = local("current_state", ops.index(t, self.x, ids))
        for name, matrix in self.matrices.items():
            state = self._project(t, name, state, matrix)
            if name != "down_proj":
                local("gate_up", state)
                state = local("current_hidden_states", self._between(t, state))
        local("current_hidden_states", state)
        column = ops.view(t, ops.index_elements(t, self.weights, ids), ((rows,), ()))
        weighted = local("current_hidden_states", ops.mul(t, state, column))
        return ops.index_add(t, out, ids, ops.to(t, weighted, out.dtype))

    def _project(self, t: Trace, name: str, x: Tensor, matrix: Tensor) -> Tensor:
        weight = ops.select(t, matrix, 0)
        if not self.form.transposed:
            return ops.linear(t, x, weight)
        product = ops.autocast_mm(t, x, weight)
        return ops.add(t, product, ops.select(t, self.biases[name], 0)) if self.biases else product

    def _between(self, t: Trace, x: Tensor) -> Tensor:
        width = (t.dim("f", self.spec.width),)
        return self.form.gate(t, x, width, self.spec) if self.spec.gated else activation(t, self.spec.activation, x)


def _loop(t: Trace, out: Tensor, routing: Routing, turn: _Turn, local: Frame) -> Tensor:
    """The loop over experts: few of its turns are built, the others save what these do."""
    built = min(routing.turns, BUILT_TURNS)
    rows = _rows(t, routing, built)
    others, begins = None, []
    for index in range(built):
        if index == 1 and routing.turns > built:
            out, others = ops.other_turns(t, out)
        begins.append(len(t.graph.ops))
        out = local("final_hidden_states", turn.run(t, out, rows[index], local))
    if others is not None:
        count = t.dim("other_experts", routing.turns - built)
        ops.repeat_turn(t, others, t.graph.ops[begins[1] : begins[2]], count)
    return out


def _rows(t: Trace, routing: Routing, built: int) -> Sequence[Dim]:
    """Names of the built turns' numbers of tokens."""
    most, each = t.dim("n_most", routing.most), t.dim("n_each", routing.each)
    return [most, *[each] * (built - 2), t.dim("n_last", routing.last)][:built]
