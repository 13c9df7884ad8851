"""What Megatron-LM's pipeline loops are made of: receive, forward, deallocate and backward, as parts of a program.

Source: megatron-core 0.16 megatron/core/pipeline_parallel/schedules.py `forward_step`, `backward_step`,
`deallocate_output_tensor`; p2p_communication.py `P2PCommunicator._communicate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from hardware.dtypes import FP32, INT32, DType
from simulator.graph import Storage
from simulator.pipelines.held import Thing, Variables
from simulator.pipelines.megatron_chunk import ChunkMicroBatch
from simulator.pipelines.pipeline import MegatronLoop
from simulator.pipelines.stage_micro_batch import ForwardNodes, StageBackward
from simulator.program import Node, TreeBuilder
from simulator.recorder import Recorder, Step
from simulator.roles import Phase, Role
from simulator.runtime import Job, Runtime, Turn, buffer
from simulator.sizes import AnySize, size_of


@attrs.frozen(eq=False)
class _Backward:
    node: Node
    recorded: StageBackward


class MegatronParts:
    """The parts of one optimizer step on one rank, in the order in which a loop asks for them.

    Args:
        job: the rank.
        loop: which rank it is, and how its loop treats outputs.
        builder: makes trees of recorded steps.
        runtimes: what wraps the model's chunks.

    Attributes:
        variables: what the loop and the model's chunks hold.
        parts: of the program, so far.
        turns: where in `parts` the forward and the backward of one turn begin.
    """

    def __init__(self, job: Job, loop: MegatronLoop, builder: TreeBuilder, runtimes: Sequence[Runtime]) -> None:
        self.variables = Variables(self._free)
        self.parts: list[Node] = []
        self.turns: list[int] = []
        self._job = job
        self._loop = loop
        self._builder = builder
        self._runtimes = runtimes
        self._stages = job.graph.stages
        self._micro_batch = ChunkMicroBatch(job, runtimes)
        self._forwards: dict[int, ForwardNodes] = {}
        self._backwards: dict[tuple[int, bool], _Backward] = {}
        self._made: dict[tuple[str, int | None], Storage] = {}
        self._single: dict[tuple[str, Storage], Node] = {}
        self._new: dict[int, bool] = {}

    def begin_step(self, *, cold: bool) -> None:
        """``zero_grad``; then the loop counts tokens on the device (``total_num_tokens``)."""
        self.parts, self.turns = [], []
        standing = not cold and self._job.plan.training.zero_grad == "zero"
        self._new = dict.fromkeys(range(len(self._stages)), not standing)
        self._job.recorder = Recorder()
        for runtime in self._runtimes:
            runtime.begin_forward(Turn(cold, first=True, last=False))
        if self._job.recorder.steps:
            self.parts.append(self._builder.tree(self._job.recorder.steps))
        tokens = self._storage("total_num_tokens", None, size_of((), INT32.bits), INT32, Role.LOSS_HEAD)
        self.variables.bind("total_num_tokens", self._allocate(tokens, Phase.FORWARD))

    # memory of the loop's own --------------------------------------------------------------------------------------

    def _storage(self, what: str, number: int | None, size: AnySize, dtype: DType, role: Role) -> Storage:
        """One for all micro-batches: they are alike."""
        if (what, number) not in self._made:
            label = what if number is None else f"stage{number}.{what}"
            self._made[what, number] = buffer(label, size, dtype, role)
        return self._made[what, number]

    def _allocate(self, storage: Storage, phase: Phase) -> Thing:
        self._step("empty.memory_format", storage, Step("empty.memory_format", phase, "", None, [storage], []))
        return Thing([storage])

    def _free(self, storage: Storage) -> None:
        self._step("free", storage, Step("free", Phase.BACKWARD, "", None, [], [storage]))

    def _step(self, name: str, storage: Storage, step: Step) -> None:
        if (name, storage) not in self._single:
            self._single[name, storage] = self._builder.tree([step])
        self.parts.append(self._single[name, storage])

    def receive_forward(self, number: int) -> Thing | None:
        """Hidden states from the stage before, in new memory; nothing where there is none."""
        received = self._stages[number].received
        if received is None:
            return None
        like = received.storage
        made = self._storage("received_activation", number, like.size, like.dtype, Role.RECEIVED)
        return self._allocate(made, Phase.FORWARD)

    def receive_backward(self, number: int) -> Thing | None:
        """The gradient of what was sent, in new memory; nothing after the loss."""
        stage = self._stages[number]
        if stage.loss is not None:
            return None
        like = stage.gradient_received().storage
        made = self._storage("received_gradient", number, like.size, like.dtype, Role.RECEIVED)
        return self._allocate(made, Phase.BACKWARD)

    def deallocate(self, number: int, output: Thing) -> None:
        """`deallocate_output_tensor`: new memory for one element, then the old memory goes."""
        tensor = self._stages[number].output
        assert tensor is not None
        if not self._loop.deallocate_pipeline_outputs:
            return
        size = size_of((), tensor.dtype.bits)
        one = self._storage("deallocated", number, size, tensor.dtype, Role.ACTIVATION)
        self._allocate(one, Phase.FORWARD)
        self.variables.replace(output, one)

    # computation ---------------------------------------------------------------------------------------------------

    def forward(self, number: int, micro_batch: int, received: Thing | None) -> Thing:
        """`forward_step`: the block keeps its input until it is given the next (``set_input_tensor``)."""
        if received is not None:
            self.variables.bind(("input_tensor", number), received)
        if number not in self._forwards:
            recorded = self._micro_batch.forward_chunk(number)
            self._forwards[number] = ForwardNodes.of(recorded, self._builder)
        done, stage = self._forwards[number], self._stages[number]
        self.parts.append(done.model)
        if done.loss is not None:
            self.parts.append(done.loss)
            report = self._storage("lm loss", None, size_of((), FP32.bits), FP32, Role.LOSS_HEAD)
            self.variables.bind(("forward_data_store", micro_batch), self._allocate(report, Phase.FORWARD))
        assert stage.output is not None
        output = Thing([stage.output.storage])
        if received is not None:
            self.variables.keep(output, received)  # its graph ends at the leaf
        return output

    def backward(self, number: int, received: Thing | None, *, scaled: bool) -> Thing | None:
        """`backward_step`: the gradient of what was received, which holds it as well.

        Args:
            number: of the rank's chunk.
            received: its input, if the chunk has one.
            scaled: whether the loss is held besides its product with the scale of ``grad_scale_func``.
        """
        if scaled:
            product = self._storage("scaled loss", None, size_of((), FP32.bits), FP32, Role.LOSS_HEAD)
            self.variables.bind("scaled loss", self._allocate(product, Phase.BACKWARD))
        done = self._run_backward(number)
        self.variables.drop("scaled loss")
        if done.gradient is None:
            return None
        gradient = Thing([done.gradient])
        assert received is not None
        self.variables.keep(received, gradient)
        return gradient

    def _run_backward(self, number: int) -> StageBackward:
        key = number, self._new[number]
        if key not in self._backwards:
            recorded = self._micro_batch.backward_chunk(number, self._forwards[number].recorded.after)
            self._backwards[key] = _Backward(self._builder.tree(recorded.steps), recorded)
        self._new[number] = False
        self.parts.append(self._backwards[key].node)
        return self._backwards[key].recorded
