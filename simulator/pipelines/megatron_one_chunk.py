"""Megatron-LM's loop over micro-batches on one chunk of the model, one Python variable after the other.

Source: megatron-core 0.16 megatron/core/pipeline_parallel/schedules.py
`forward_backward_pipelining_without_interleaving`. Technique: Narayanan et al., arXiv:2006.09503.
"""

from __future__ import annotations

from simulator.pipelines.held import HeldList, Thing
from simulator.pipelines.megatron_parts import MegatronParts
from simulator.pipelines.pipeline import MegatronLoop


def without_interleaving(run: MegatronParts, loop: MegatronLoop, micro_batches: int) -> None:
    """1F1B on the rank's one chunk."""
    bind, inputs, outputs = run.variables.bind, HeldList(run.variables), HeldList(run.variables)
    ahead = min(loop.ranks - loop.rank - 1, micro_batches)

    def receive() -> None:
        bind("input_tensor", run.receive_forward(0))

    def forward(micro_batch: int) -> Thing:
        output = run.forward(0, micro_batch, run.variables.bound("input_tensor"))
        bind("output_tensor", output)
        return output

    def remember(output: Thing) -> None:
        inputs.append(run.variables.bound("input_tensor"))
        outputs.append(output)
        run.deallocate(0, output)

    def backward() -> None:
        received = run.variables.bound("input_tensor")
        bind("input_tensor_grad", run.backward(0, received, scaled=False))

    def pop() -> None:
        inputs.pop_into("input_tensor")
        outputs.pop_into("output_tensor")

    for micro_batch in range(ahead):
        receive()
        remember(forward(micro_batch))
    if micro_batches > ahead:
        receive()
    for micro_batch in range(ahead, micro_batches):
        run.turns.append(len(run.parts))
        output = forward(micro_batch)
        bind("output_tensor_grad", run.receive_backward(0))
        remember(output)
        pop()
        backward()
        bind("input_tensor", None if micro_batch == micro_batches - 1 else run.receive_forward(0))
    for _ in range(ahead):
        pop()
        bind("output_tensor_grad", run.receive_backward(0))
        backward()
    run.variables.drop("input_tensor", "output_tensor", "output_tensor_grad", "input_tensor_grad")
