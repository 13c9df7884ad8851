"""What a rank does, as a tree of actions with repeats: unrolled it is the order, folded it is what is in flight."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import attrs
import numpy as np
import numpy.typing as npt


class Kind(IntEnum):
    """What is computed of one micro-batch on one chunk; the letters are torch.distributed.pipelining's."""

    F = 0
    """Forward."""
    B = 1
    """Full backward: gradients of inputs and of weights."""
    I = 2  # noqa: E741
    """Backward for the inputs alone (B in the papers on zero-bubble schedules)."""
    W = 3
    """Backward for the weights, some time after that for the inputs."""


@attrs.frozen
class Action:
    """One computation of a rank.

    Attributes:
        kind: what is computed.
        chunk: which of the rank's model chunks, from 0 on.
        micro_batch: from 0 on; inside a `Repeat`, that of the first iteration.
        overlapped: starts together with the next action (DualPipe's overlapped forward and backward).
    """

    kind: Kind
    chunk: int
    micro_batch: int
    overlapped: bool = False


@attrs.frozen
class Leaf:
    """A straight run of actions."""

    actions: tuple[Action, ...]


@attrs.frozen
class Seq:
    """One part after the other."""

    parts: tuple[Node, ...]


@attrs.frozen
class Repeat:
    """`count` times `body`; iteration i runs on micro-batches ``i * stride`` further on."""

    count: int
    body: Node
    stride: int


Node = Leaf | Seq | Repeat

#: Integers, a row per action: kind, chunk, micro-batch, overlapped.
Order = npt.NDArray[np.int64]
#: What one action adds to a total: a number for each kind, and in it for each chunk.
Gains = Sequence[Sequence[int]]


def flat(node: Node) -> Order:
    """The order that a tree stands for, of shape (actions, 4)."""
    match node:
        case Leaf(actions):
            numbers = [n for a in actions for n in (a.kind, a.chunk, a.micro_batch, a.overlapped)]
            return np.fromiter(numbers, np.int64, len(numbers)).reshape(-1, 4)
        case Seq(parts):
            return np.concatenate([np.empty((0, 4), np.int64), *map(flat, parts)])
        case Repeat(1, body, _):
            return flat(body)
        case Repeat(times, body, stride):
            once = flat(body)
            turns = np.broadcast_to(once, (times, *once.shape)).copy()
            turns[:, :, 2] += np.arange(times)[:, None] * stride
            return turns.reshape(-1, 4)


def fold(node: Node, gains: Gains) -> tuple[int, int]:
    """What a tree adds to a total, and the most the total rises above its start, without unrolling."""
    match node:
        case Leaf(actions):
            total = highest = 0
            for action in actions:
                total += gains[action.kind][action.chunk]
                highest = max(highest, total)
            return total, highest
        case Seq(parts):
            total = highest = 0
            for part in parts:
                net, peak = fold(part, gains)
                highest = max(highest, total + peak)
                total += net
            return total, highest
        case Repeat(times, body, _):
            net, peak = fold(body, gains)
            # A total that rises from turn to turn is highest in the last, one that falls in the first.
            return times * net, peak + max(0, (times - 1) * net)


def fold_by_chunk(node: Node, gains: Gains) -> dict[int, tuple[int, int]]:
    """Like `fold`, for the actions of each chunk by themselves, in one walk."""
    found: dict[int, tuple[int, int]] = {}
    match node:
        case Leaf(actions):
            for action in actions:
                gain = gains[action.kind][action.chunk]
                _join(found, action.chunk, gain, max(gain, 0))
        case Seq(parts):
            for part in parts:
                for chunk, (net, peak) in fold_by_chunk(part, gains).items():
                    _join(found, chunk, net, peak)
        case Repeat(times, body, _):
            for chunk, (net, peak) in fold_by_chunk(body, gains).items():
                found[chunk] = times * net, peak + max(0, (times - 1) * net)
    return found


def _join(found: dict[int, tuple[int, int]], chunk: int, net: int, peak: int) -> None:
    total, highest = found.get(chunk, (0, 0))
    found[chunk] = total + net, max(highest, total + peak)


def count(node: Node) -> int:
    """How many actions a tree stands for."""
    match node:
        case Leaf(actions):
            return len(actions)
        case Seq(parts):
            return sum(map(count, parts))
        case Repeat(times, body, _):
            return times * count(body)


def text(node: Node) -> str:
    """A tree in one line: ``3*(0F0+1) 5*(0F3+1 0B0+1)``, chunk, kind, micro-batch and its step per turn."""
    return _text(node, "")


def _text(node: Node, steps: str) -> str:
    match node:
        case Leaf(actions):
            words = [f"{a.chunk}{a.kind.name}{a.micro_batch}{steps}{'&' * a.overlapped}" for a in actions]
            return " ".join(words)
        case Seq(parts):
            return " ".join(_text(part, steps) for part in parts)
        case Repeat(times, body, stride):
            inside = _text(body, f"{steps}+{stride}")
            return f"{times}*({inside})"
