"""Adam-mini (Zhang et al., arXiv 2406.16793, algorithm 1): one second moment per head, row or tensor.

Source: its authors' package adam-mini 1.1.1, adam_mini/adam_mini.py `Adam_mini.step`, given the model's own sizes and
names. A weight is split by what its name says; the names are those of its constructor.
"""

from __future__ import annotations

from collections.abc import Iterable

from hardware.dtypes import FP32
from hardware.errors import UnsupportedError
from simulator.graph import Storage
from simulator.optimizers.step import OptimizerStep, Parameter
from simulator.sizes import Dim

ADAM = ("bias",)
PER_HEAD = ("k_proj", "q_proj", "wq", "wk", "query", "key")
VOCABULARY = ("embed", "embd", "wte", "lm_head", "output", "final_layer")
PER_ROW = (*VOCABULARY, "v_proj", "wv", "value", "feed_forward", "linear", "mlp", "o_proj", "wo", "attn.proj")


def adam_mini(step: OptimizerStep) -> None:
    """``Adam_mini.step``: one parameter after the other; names live on into the next parameter's turn."""
    for parameter in step.parameters:
        if _is_named(parameter, ADAM):
            _adam(step, parameter)
        elif _is_named(parameter, PER_HEAD):
            _blocks(step, parameter, (_heads(step, parameter),))
        elif _is_named(parameter, PER_ROW):
            _blocks(step, parameter, _rows(parameter))
        else:
            _whole(step, parameter)


def _is_named(parameter: Parameter, names: Iterable[str]) -> bool:
    return any(name in parameter.storage.label.lower() for name in names)


def _heads(step: OptimizerStep, parameter: Parameter) -> Dim:
    """Blocks of hidden size x hidden size / heads, into which the package views a weight."""
    hidden, heads = step.count(("h",)), step.surroundings.heads
    elements = hidden * hidden // heads
    if step.count(parameter.dims) % elements:
        raise UnsupportedError(
            f"'optimizer' adam_mini splits {parameter.storage.label} into heads of {elements} numbers, which it has no "
            "whole number of: use adamw"
        )
    return step.parts(parameter.dims, elements)


def _rows(parameter: Parameter) -> tuple[Dim, ...]:
    if len(parameter.shape) != 2:
        axes = len(parameter.shape)
        raise UnsupportedError(
            f"'optimizer' adam_mini takes {parameter.storage.label} for a matrix, but it has {axes} axes: use adamw"
        )
    return parameter.rows


def _adam(step: OptimizerStep, parameter: Parameter) -> None:
    for moment in ("m", "v"):
        step.state(parameter, moment, parameter.dims, parameter.dtype, "zeros_like.default")
    step.local("h", _denominator(step, parameter, parameter.dims))
    step.local("stepsize", None)  # a number here


def _blocks(step: OptimizerStep, parameter: Parameter, blocks: tuple[Dim, ...]) -> None:
    """A mean of squares for each block of a matrix."""
    step.state(parameter, "m", parameter.dims, parameter.dtype, "zeros_like.default")
    step.state(parameter, "vmean", blocks, parameter.dtype, "zeros_like.default")
    squares = _full(step, parameter, "mul.Tensor", "squares")
    step.local("tmp_lr", _part(step, parameter, "mean.dim", blocks, "tmp_lr"))
    step.free([squares])
    _update(step, parameter, blocks)


def _whole(step: OptimizerStep, parameter: Parameter) -> None:
    """One mean of squares; the count of numbers, sent to the device, is a name that the next count takes over."""
    if not step.has_state(parameter, "m"):
        number = step.temporary(parameter, "_to_copy.default", (), FP32, "block_numel")
        step.local("block_numel", number)
        step.state(parameter, "m", parameter.dims, parameter.dtype, "zeros_like.default")
        total = _sum_of_squares(step, parameter, "total")
        step.state(parameter, "vmean", (), parameter.dtype, "zeros_like.default")
        step.free([total])
    step.local("tmp_lr", _sum_of_squares(step, parameter, "sum"))
    step.local("tmp_lr", _part(step, parameter, "div.Tensor", (), "tmp_lr"))
    _update(step, parameter, ())


def _sum_of_squares(step: OptimizerStep, parameter: Parameter, name: str) -> Storage:
    squares = _full(step, parameter, "mul.Tensor", f"{name}.squares")
    total = _part(step, parameter, "sum.default", (), name)
    step.free([squares])
    return total


def _update(step: OptimizerStep, parameter: Parameter, blocks: tuple[Dim, ...]) -> None:
    step.local("h", _denominator(step, parameter, blocks))
    inverse = _part(step, parameter, "reciprocal.default", blocks, "inverse")
    step.local("stepsize", _part(step, parameter, "mul.Tensor", blocks, "stepsize"))
    step.free([inverse])
    step.local("update", _full(step, parameter, "mul.Tensor", "update"))
    step.free([_full(step, parameter, "neg.default", "negated")])


def _denominator(step: OptimizerStep, parameter: Parameter, dims: tuple[Dim, ...]) -> Storage:
    root = _part(step, parameter, "sqrt.default", dims, "root")
    denominator = _part(step, parameter, "div.Tensor", dims, "h")
    step.free([root])
    return denominator


def _full(step: OptimizerStep, parameter: Parameter, op: str, name: str) -> Storage:
    return step.like(parameter, op, name)


def _part(step: OptimizerStep, parameter: Parameter, op: str, dims: tuple[Dim, ...], name: str) -> Storage:
    return step.temporary(parameter, op, dims, parameter.dtype, name)
