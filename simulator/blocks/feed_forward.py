"""Feed-forward networks and their activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hardware.errors import UnsupportedError
from simulator import ops
from simulator.blocks.linear import module_input, projection
from simulator.graph import Tensor
from simulator.model import FeedForwardSpec
from simulator.trace import Trace

#: Hidden states through a channel mixer.
Feed = Callable[[Trace, Tensor, FeedForwardSpec], Tensor]


def gated_mlp(
    t: Trace, x: Tensor, spec: FeedForwardSpec, names: Sequence[str] = ("mlp", "gate_proj", "up_proj", "down_proj")
) -> Tensor:
    """`LlamaMLP`: ``down(act(gate(x)) * up(x))`` (arXiv 2002.05202).

    Args:
        names: of the module and its gate, up and down projections.
    """
    width = t.shard((t.dim("f", spec.width),))
    with t.call(names[0], x) as local:
        x = local("x", module_input(t, names[0], x))
        gate = projection(t, names[1], x, width, spec.bias)
        if _gate_is_fused(t, spec):
            up = projection(t, names[2], x, width, spec.bias)
            return projection(t, names[3], _fused_gate(t, gate, up), ("h",), spec.bias)
        with t.call("act_fn", gate):
            active = activation(t, spec.activation, gate)
        up = projection(t, names[2], x, width, spec.bias)
        return projection(t, names[3], ops.mul(t, active, up), ("h",), spec.bias)


#: Names of the modules of a plain MLP, where a family has no others.
PLAIN_MLP = ("mlp", "up_proj", "act_fn", "down_proj")


def fused_gated_mlp(t: Trace, x: Tensor, spec: FeedForwardSpec) -> Tensor:
    """`Phi3MLP` (models/phi3/modeling_phi3.py): gate and up are halves of one projection."""
    width = t.dim("f", spec.width)
    both = (t.dim("2f", 2 * spec.width),)
    with t.call("mlp", x) as local:
        states = local("up_states", projection(t, "gate_up_proj", x, both, spec.bias))
        gate, up = ops.split(t, states, (*x.shape[:-1], (width,)), 2)
        local("gate", gate)
        local("up_states", up)
        if _gate_is_fused(t, spec):
            return projection(t, "down_proj", _fused_gate(t, gate, up), ("h",), spec.bias)
        with t.call("activation_fn", gate):
            active = activation(t, spec.activation, gate)
        states = local("up_states", ops.mul(t, up, active))
        return projection(t, "down_proj", states, ("h",), spec.bias)


def _gate_is_fused(t: Trace, spec: FeedForwardSpec) -> bool:
    """Whether Liger's SwiGLU or GeGLU runs (liger_kernel/transformers/swiglu.py, geglu.py)."""
    for kernel, on, activations in (("swiglu", t.regime.liger.swiglu, SILU), ("geglu", t.regime.liger.geglu, GELU)):
        if on and spec.activation not in activations:
            raise UnsupportedError(
                f"'liger' {kernel} computes {activations[0]}, not {spec.activation} as this model: leave {kernel} out"
            )
    return t.regime.liger.swiglu or t.regime.liger.geglu


def _fused_gate(t: Trace, gate: Tensor, up: Tensor) -> Tensor:
    return ops.liger_gate(t, "liger_swiglu" if t.regime.liger.swiglu else "liger_geglu", gate, up)


def dropout_add(t: Trace, x: Tensor, residual: Tensor, rate: float) -> Tensor:
    """`dropout_add` (models/bloom/modeling_bloom.py)."""
    with t.call("", x) as local:
        return ops.add(t, residual, local("out", ops.dropout(t, x, rate)))


def plain_mlp(
    t: Trace, x: Tensor, spec: FeedForwardSpec, names: Sequence[str] = PLAIN_MLP, dropout: float = 0.0
) -> Tensor:
    """``down(act(up(x)))``, as GPT-2 has it.

    Args:
        t: the trace.
        x: hidden states ``[b, s, h]``.
        spec: sizes and activation.
        names: of the module, its first projection, its activation and its second projection.
        dropout: rate on the result.
    """
    with t.call(names[0], x) as local:
        hidden = local("hidden", projection(t, names[1], x, t.shard((t.dim("f", spec.width),)), spec.bias))
        with t.call(names[2], hidden):
            hidden = local("hidden", activation(t, spec.activation, hidden))
        hidden = local("hidden", projection(t, names[3], hidden, ("h",), spec.bias))
        return ops.dropout(t, hidden, dropout)


def activation(t: Trace, name: str, x: Tensor) -> Tensor:
    """`ACT2FN[name]` (activations.py)."""
    if name in _COMPOSED:
        return _COMPOSED[name](t, x)
    if name not in _FUSED:
        known = ", ".join(sorted([*_COMPOSED, *_FUSED]))
        raise UnsupportedError(f"'activation' must be one of {known}: {name!r} is not modelled")
    return _FUSED[name](t, x)


_FUSED = {
    "silu": ops.silu,
    "swish": ops.silu,
    "relu": ops.relu,
    "gelu": ops.gelu,
    "gelu_pytorch_tanh": ops.gelu,
}


def _gelu_new(t: Trace, x: Tensor) -> Tensor:
    """`NewGELUActivation`: the tanh approximation spelled out in Python, so every factor is a tensor."""
    with t.call("", x):
        half = ops.mul_scalar(t, x)
        cubed = ops.mul_scalar(t, ops.power(t, x))
        inner = ops.mul_scalar(t, ops.add(t, x, cubed))
        return ops.mul(t, half, ops.add_scalar(t, ops.tanh(t, inner)))


def _relu_squared(t: Trace, x: Tensor) -> Tensor:
    """`ReLUSquaredActivation`, or Liger's in its place."""
    if t.regime.liger.relu_squared:
        return ops.liger_relu_squared(t, x)
    with t.call("", x) as local:
        return ops.power(t, local("relu_applied", ops.relu(t, x)))


_COMPOSED = {"gelu_new": _gelu_new, "relu2": _relu_squared}


def check_feed_forward(t: Trace, spec: FeedForwardSpec, activations: Sequence[str], *, bias: bool) -> None:
    """Refuse what an implementation with one activation, or without biases, does not compute."""
    name = t.regime.implementation
    if spec.activation not in activations:
        raise UnsupportedError(
            f"'activation' must be {' or '.join(activations)} with implementation {name!r}, not {spec.activation!r}"
        )
    if spec.bias != bias:
        raise UnsupportedError(f"biases of the feed-forward must be {str(bias).lower()} with implementation {name!r}")


#: Names of the tanh approximation, which one kernel computes.
GELU = ("gelu", "gelu_new", "gelu_pytorch_tanh")
SILU = ("silu", "swish")
