"""Megatron-LM's loop over micro-batches on several chunks of the model, one Python variable after the other.

Source: megatron-core 0.16 megatron/core/pipeline_parallel/schedules.py
`forward_backward_pipelining_with_interleaving`. Technique: Narayanan et al., arXiv:2104.04473.
"""

from __future__ import annotations

from simulator.pipelines.held import HeldList, Thing
from simulator.pipelines.megatron_parts import MegatronParts
from simulator.pipelines.pipeline import BACKWARD, FORWARD, MegatronLoop

#: Variables of `forward_backward_helper_wrapper`, which runs a forward, a backward or both.
_FORWARD, _BACKWARD = "forward_output_tensor", "backward_input_tensor_grad"


class Interleaved:
    """The chunks of a rank by turns.

    Args:
        run: makes the parts.
        loop: which rank it is, its order of forwards and backwards (`get_schedule_table`), how it communicates.
    """

    def __init__(self, run: MegatronParts, loop: MegatronLoop) -> None:
        self._run = run
        self._loop = loop
        self._chunks = chunks = loop.chunks
        self._forwards = [action for action in loop.order if action.kind == FORWARD]
        self._backwards = [action for action in loop.order if action.kind == BACKWARD]
        self._inputs, self._outputs, self._gradients = (
            [HeldList(run.variables) for _ in range(chunks)] for _ in range(3)
        )
        ahead = (loop.ranks - loop.rank - 1) * 2 + (chunks - 1) * loop.group
        self._total = len(self._forwards)
        self._ahead = min(ahead, self._total)
        last_buffers = loop.group - loop.ranks + 1  # those that wait for a turn at the ends of the pipeline
        self._forward_buffers = last_buffers if self._first_rank else 1
        self._backward_buffers = last_buffers if self._last_rank else 1
        self._sent: int | None = None

    @property
    def _first_rank(self) -> bool:
        return self._loop.rank == 0

    @property
    def _last_rank(self) -> bool:
        return self._loop.rank == self._loop.ranks - 1

    def run(self) -> None:
        """All three phases; then the variables go out of scope."""
        self._warm_up()
        for k in range(self._total - self._ahead):
            self._run.turns.append(len(self._run.parts))
            (self._overlapped_turn if self._loop.overlap_p2p_comm else self._turn)(k)
        self._deallocate()
        self._cool_down()
        buffers = [("fwd_recv_buffer", n) for n in range(self._forward_buffers)]
        buffers += [("bwd_recv_buffer", n) for n in range(self._backward_buffers)]
        names = ("input_tensor", "output_tensor", "output_tensor_grad", "input_tensor_grad", *buffers)
        self._run.variables.drop(*names)

    # phases --------------------------------------------------------------------------------------------------------

    def _warm_up(self) -> None:
        bind = self._run.variables.bind
        all_of_them = self._ahead == self._total
        self._inputs[0].append(self._run.receive_forward(0))
        for k in range(self._ahead):
            receives, following = self._receives(k, FORWARD)
            receives = receives and k < self._total - 1
            bind("output_tensor", self._forward(k))
            self._sent = self._forwards[k].chunk
            if self._is_loss(k):
                bind("output_tensor", None)
            last = k == self._ahead - 1 and not all_of_them
            received = self._receive(FORWARD, following) if receives else None
            gradient = self._first_gradient() if last and not self._loop.overlap_p2p_comm else None
            bind("input_tensor", received)
            if last and not self._loop.overlap_p2p_comm:
                bind("output_tensor_grad", gradient)
                self._gradients[-1].append(gradient)
            if receives:
                self._inputs[following].append(received)
            self._deallocate()
            if last and self._loop.overlap_p2p_comm and not self._last_rank:
                gradient = self._first_gradient()
                bind(("bwd_recv_buffer", self._backward_buffers - 1), gradient)
                self._gradients[-1].append(gradient)

    def _first_gradient(self) -> Thing | None:
        return None if self._last_rank else self._receive(BACKWARD, self._chunks - 1)

    def _overlapped_turn(self, k: int) -> None:
        """A forward and a backward, each of which communicates when it is done (`pp_post_forward`)."""
        forward_k = k + self._ahead
        self._deallocate()
        self._run.variables.bind(_FORWARD, self._forward(forward_k))
        self._post_forward(forward_k)
        self._run.variables.bind(_BACKWARD, self._backward(k))
        self._post_backward(k)
        self._returned(forward_k)

    def _returned(self, forward_k: int | None = None) -> None:
        """`forward_backward_helper_wrapper` returns what it has."""
        variables = self._run.variables
        if forward_k is not None:
            variables.bind("output_tensor", variables.bound(_FORWARD))
            self._sent = self._forwards[forward_k].chunk
        variables.bind("input_tensor_grad", variables.bound(_BACKWARD))
        variables.drop(_FORWARD, _BACKWARD)

    def _post_forward(self, forward_k: int) -> None:
        if self._is_loss(forward_k):
            self._run.variables.drop(_FORWARD)
        receives, following = self._receives(forward_k, FORWARD)
        receives = receives and forward_k < self._total - 1
        received = self._receive(FORWARD, following) if receives else None
        self._buffer("fwd_recv_buffer", self._forward_buffers, forward_k, received)
        if receives:
            self._inputs[following].append(received)
            self._buffer("fwd_recv_buffer", self._forward_buffers, forward_k + 1, None)

    def _post_backward(self, backward_k: int) -> None:
        receives, following = self._receives(backward_k, BACKWARD)
        received = self._receive(BACKWARD, following) if receives else None
        self._buffer("bwd_recv_buffer", self._backward_buffers, backward_k, received)
        if receives:
            self._gradients[following].append(received)
            self._buffer("bwd_recv_buffer", self._backward_buffers, backward_k + 1, None)

    def _buffer(self, name: str, count: int, number: int, thing: Thing | None) -> None:
        self._run.variables.bind((name, number % count), thing)

    def _turn(self, k: int) -> None:
        """A forward and a backward, and then all communication at once."""
        bind = self._run.variables.bind
        forward_k = k + self._ahead
        bind(_FORWARD, self._forward(forward_k))
        bind(_BACKWARD, self._backward(k))
        self._returned(forward_k)
        if self._is_loss(forward_k):
            bind("output_tensor", None)
        receives, following = self._receives(forward_k, FORWARD)
        receives = receives and forward_k < self._total - 1
        wanted, before = self._receives(k, BACKWARD)
        received = self._receive(FORWARD, following) if receives else None
        gradient = self._receive(BACKWARD, before) if wanted else None
        bind("input_tensor", received)
        bind("output_tensor_grad", gradient)
        self._deallocate()
        if receives:
            self._inputs[following].append(received)
        if wanted:
            self._gradients[before].append(gradient)

    def _cool_down(self) -> None:
        bind = self._run.variables.bind
        if self._ahead == self._total:
            self._gradients[-1].append(self._first_gradient())
        for k in range(self._total - self._ahead, self._total):
            receives, following = self._receives(k, BACKWARD)
            receives = receives and k < self._total - 1
            bind(_BACKWARD, self._backward(k))
            self._returned()
            received = self._receive(BACKWARD, following) if receives else None
            bind("output_tensor_grad", received)
            if receives:
                self._gradients[following].append(received)

    # one step ------------------------------------------------------------------------------------------------------

    def _forward(self, k: int) -> Thing:
        """`forward_step_helper`."""
        action = self._forwards[k]
        inputs = self._inputs[action.chunk]
        if self._first_rank and action.chunk == 0 and len(inputs) == len(self._outputs[0]):
            inputs.append(None)
        output = self._run.forward(action.chunk, action.micro_batch, inputs.at(action.micro_batch))
        self._outputs[action.chunk].append(output)
        return output

    def _backward(self, k: int) -> Thing | None:
        """`backward_step_helper`, whose variables go when it returns."""
        number = self._backwards[k].chunk
        at_the_end = self._last_rank and number == self._chunks - 1
        if at_the_end and not len(self._gradients[number]):
            self._gradients[number].append(None)
        received = self._inputs[number].pop_into("helper.input_tensor")
        self._outputs[number].pop_into("helper.output_tensor")
        self._gradients[number].pop_into("helper.output_tensor_grad")
        gradient = self._run.backward(number, received, scaled=at_the_end)
        self._run.variables.bind(_BACKWARD, gradient)
        self._run.variables.drop("helper.input_tensor", "helper.output_tensor", "helper.output_tensor_grad")
        return gradient

    def _is_loss(self, forward_k: int) -> bool:
        """Whether a forward ends the model: its loss is not sent."""
        return self._last_rank and self._forwards[forward_k].chunk == self._chunks - 1

    def _deallocate(self) -> None:
        output = self._run.variables.bound("output_tensor")
        if output is not None and self._sent is not None:
            self._run.deallocate(self._sent, output)

    def _receive(self, kind: str, number: int) -> Thing | None:
        return self._run.receive_forward(number) if kind == FORWARD else self._run.receive_backward(number)

    def _receives(self, k: int, kind: str) -> tuple[bool, int]:
        """`recv_tensor_from_previous_stage`: whether a neighbour sends, and for which chunk."""
        table = self._forwards if kind == FORWARD else self._backwards
        leads = self._first_rank if kind == FORWARD else self._last_rank
        if not leads:
            return True, table[(k + 1) % self._total].chunk
        behind = self._loop.ranks - 1
        chunk = table[(k + 1 if k < behind else k - behind) % self._total].chunk
        end = self._chunks - 1 if kind == FORWARD else 0
        return k >= behind and chunk != end, chunk + (1 if kind == FORWARD else -1)
