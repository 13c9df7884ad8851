"""The batch of transformers' models with context parallelism, as Trainer and torch's ``context_parallel`` leave it."""

from __future__ import annotations

from hardware.dtypes import INT64
from hardware.errors import UnsupportedError
from simulator.context_parallel import AXIS, WHOLE
from simulator.graph import Tensor, flat
from simulator.sizes import maximum
from simulator.trace import Trace


def sharded_batch(t: Trace) -> tuple[Tensor, Tensor]:
    """The rank's part of a micro-batch, resized in place: memory stays that of whole sequences.

    Labels are shifted before, positions given. The context manager's frame keeps each part and a copy of the last one
    (transformers/trainer.py `_prepare_context_parallel_inputs`, torch's `context_parallel`).
    """
    if t.regime.pipelined:
        raise UnsupportedError("'cp' above 1 in a pipeline of transformers' models is not modelled: leave one out")
    whole, sizes = ("b", *WHOLE), t.dimensions.bindings
    # shifted labels of one sequence are a view of the padded ones, of several a copy
    shifted = (t.dim("cp*s+1", sizes[AXIS] * sizes["s"] + 1),) if "b" in t.dimensions.ones else whole
    positions = (t.dim("cp*s|b*s", maximum(sizes[AXIS], sizes["b"]) * sizes["s"]),)
    storages = {"input_ids": whole, "labels": whole, "shift_labels": shifted, "position_ids": positions}
    made = {name: t.input(name, *dims, dtype=INT64) for name, dims in storages.items()}
    for tensor in made.values():
        tensor.shape = t.squeezed((("b",), ("s",)))
        tensor.memory = flat(tensor.shape)
    for name in (*storages, "last"):
        t.input(f"{name}.part", "b", "s", dtype=INT64)
    return made["input_ids"], made["labels"]
