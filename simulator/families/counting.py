"""Counting the parameters of modules that are not built as a graph; every count is in elements."""

from __future__ import annotations


def linear(inputs: int, outputs: int, *, bias: bool = False) -> int:
    """`nn.Linear`."""
    return (inputs + bias) * outputs


def layer_norm(width: int) -> int:
    """`nn.LayerNorm` with weight and bias."""
    return 2 * width


def plain_mlp(width: int, hidden: int) -> int:
    """Two linear layers with biases, to `hidden` and back."""
    return linear(width, hidden, bias=True) + linear(hidden, width, bias=True)


def gated_mlp(width: int, hidden: int) -> int:
    """Gate, up and down projections without biases."""
    return 3 * linear(width, hidden)


def experts(width: int, hidden: int, count: int) -> int:
    """`count` gated experts and their router."""
    return count * gated_mlp(width, hidden) + linear(width, count)


def encoder_layer(width: int, hidden: int) -> int:
    """A pre-norm encoder layer with biases everywhere: two norms, four projections, a plain MLP."""
    return 2 * layer_norm(width) + 4 * linear(width, width, bias=True) + plain_mlp(width, hidden)
