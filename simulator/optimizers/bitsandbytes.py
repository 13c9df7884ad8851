"""Block-wise 8-bit and paged optimizers (Dettmers et al., arXiv 2110.02861, and 2305.14314 section 3), of bitsandbytes.

Source: bitsandbytes optim/optimizer.py `Optimizer8bit.get_state_buffer`, `Optimizer2State.init_state` and
`Optimizer1State.init_state`. The kernels update weights and states in place and allocate nothing.
"""

from __future__ import annotations

from hardware.dtypes import FP32, UINT8
from simulator.optimizers.step import OptimizerStep, Parameter

#: optim/optimizer.py, default of `min_8bit_size`: smaller parameters have fp32 states.
LEAST_8BIT_ELEMENTS = 4096
#: optim/optimizer.py `init_state`: elements that share one absolute maximum.
BLOCK_ELEMENTS = 256
#: optim/optimizer.py `get_state_buffer`: states of smaller parameters are never paged.
LEAST_PAGED_ELEMENTS = 100_000
#: functional.py `create_dynamic_map`: values of an 8-bit quantization map.
MAP_ENTRIES = 256


def adamw_8bit(step: OptimizerStep) -> None:
    """``bnb.optim.AdamW8bit.step``."""
    _blockwise(step, states=("1", "2"), paged=False)


def adamw_8bit_paged(step: OptimizerStep) -> None:
    """``bnb.optim.PagedAdamW8bit.step``."""
    _blockwise(step, states=("1", "2"), paged=True)


def adamw_paged(step: OptimizerStep) -> None:
    """``bnb.optim.PagedAdamW.step``: 32-bit states."""
    for parameter in step.parameters:
        for number in ("1", "2"):
            _buffer(step, parameter, number, eight_bit=False, paged=True)
        step.read_gradients(1, [parameter])


def lion_8bit(step: OptimizerStep) -> None:
    """``bnb.optim.Lion8bit.step``."""
    _blockwise(step, states=("1",), paged=False)


def _blockwise(step: OptimizerStep, states: tuple[str, ...], *, paged: bool) -> None:
    """One parameter after the other: bytes, and an fp32 maximum per block, for those that are big enough.

    The first of these sends the quantization maps to the device, and all of them share the maps. They are counted at
    the start of the step: in between are at most the fp32 states of small parameters.
    """
    big = {parameter for parameter in step.parameters if step.count(parameter.dims) >= LEAST_8BIT_ELEMENTS}
    for number in states if big else ():
        step.shared_state(f"qmap{number}", (MAP_ENTRIES,), FP32, "_to_copy.default")
    for parameter in step.parameters:
        for number in states:
            _buffer(step, parameter, number, eight_bit=parameter in big, paged=paged)
        for number in states if parameter in big else ():
            blocks = step.parts(parameter.dims, BLOCK_ELEMENTS)
            step.state(parameter, f"absmax{number}", (blocks,), FP32, "zeros.default")
        step.read_gradients(1, [parameter])


def _buffer(step: OptimizerStep, parameter: Parameter, number: str, *, eight_bit: bool, paged: bool) -> None:
    """A state; paged ones are managed memory outside torch's allocator, which may be on the device or not."""
    name = f"state{number}"
    if paged and step.count(parameter.dims) >= LEAST_PAGED_ELEMENTS:
        step.on_host(parameter, name)
    else:
        dtype = UINT8 if eight_bit else FP32
        step.state(parameter, name, parameter.dims, dtype, "zeros_like.default")
