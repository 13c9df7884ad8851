"""Linear layers, whole or sharded along the mesh axis ``tp``."""

from __future__ import annotations

from simulator import ops
from simulator.graph import Tensor
from simulator.ops.float8 import convertible, float8_linear
from simulator.sizes import Dim
from simulator.tensor_parallel import Style
from simulator.trace import Trace


def layer_inputs(t: Trace, *arguments: Tensor) -> tuple[Tensor, ...]:
    """What a layer's forward sees of `arguments`: FSDP2 casts floating-point ones to the compute dtype.

    Source: torch/distributed/fsdp/_fully_shard/_fsdp_state.py `_cast_forward_inputs`, a pre-forward hook.
    """
    if not t.regime.cast_inputs:
        return arguments
    return tuple(ops.to(t, x, t.regime.weights) if x.dtype.floating else x for x in arguments)


def module_input(t: Trace, module: str, x: Tensor) -> Tensor:
    """What `module` sees of `x`: the whole sequence, gathered once for all linear layers in it."""
    return whole_sequence(t, x) if t.style(module) is Style.INPUT else x


def whole_sequence(t: Trace, x: Tensor) -> Tensor:
    """`x` ``[b, s / tp, h]`` of every rank, gathered along the sequence."""
    return ops.all_gather(t, x, 1, ("s",))


def column_input(t: Trace, x: Tensor) -> Tensor:
    """The input of a column-parallel layer: gathered, prepared by the module around it, or replicated anyway."""
    parallel = t.regime.tensor_parallel
    if parallel is None or not parallel.sequence:
        return ops.replicated_input(t, x)
    return x if x.shape[1] == t.squeezed((("s",),))[0] else whole_sequence(t, x)


def reduced(t: Trace, x: Tensor) -> Tensor:
    """The partial output of a row-parallel layer, as the residual stream wants it."""
    with t.call("", x):
        sequence = t.sequence()
        return ops.all_reduce(t, x) if sequence == ("s",) else ops.reduce_scatter(t, x, 1, sequence)


def projection(t: Trace, name: str, x: Tensor, out: tuple[Dim, ...], bias: bool) -> Tensor:
    """An `nn.Linear` from the last axis of `x` to `out`, column- or row-parallel where its style says so."""
    style = t.style(name)
    with t.call(name, x) as local:
        if style is Style.COLUMN:
            x = local("input", column_input(t, x))
        weight = t.matrix("weight", out, x.shape[-1])
        offset = t.vector("bias", out) if bias else None
        if style is not Style.ROW:
            if convertible(t, x.shape[-1], out):
                return float8_linear(t, x, weight, offset, out)
            return ops.linear(t, x, weight, offset, out)
        with t.call("") as call:
            if offset is not None:  # Replicate -> Partial (placement_types.py `Partial._partition_value`)
                call("bias", ops.constant(t, "div.Tensor", offset))
            partial = ops.linear(t, x, weight, offset, out)
        return reduced(t, partial)
