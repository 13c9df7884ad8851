"""From a schedule to what one rank of a pipeline runs: its actions, with the part that repeats written once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hardware.errors import UsageError
from simulator.pipelines.pipeline import Action, Turns
from simulator.schedules.schedule import Schedule
from simulator.schedules.tree import Action as Scheduled
from simulator.schedules.tree import Leaf, Node, Repeat, Seq, flat

#: Turns of a part that are written out besides those that hand on what came before it: one in which gradients are
#: new, the one that stands for all others, and the last, after which gradients may have to be ready.
APART = 3
#: Micro-batches, in ranks, that are tried for the shorter schedule.
_TRIED = (0, 1, 2, 3, 4, 6, 8)


def rank_order(schedule: Schedule, rank: int) -> tuple[Action | Turns, ...]:
    """The actions of a rank in their order; many micro-batches run like few, with one turn repeated.

    The same schedule of few micro-batches has the same parts, some of which have fewer turns. After as many turns as
    a part's actions are micro-batches apart, all that a turn meets was left by turns like it: every further turn is
    equal, but for the micro-batches' numbers. Actions are numbered as in the shorter schedule.

    Args:
        schedule: who computes what.
        rank: of the pipeline, from 0 on.
    """
    whole = schedule.tree(rank)
    for ranks in _TRIED:
        shorter = _shortened(schedule, ranks * schedule.pp + APART + 1)
        found = None if shorter is None else _folded(whole, shorter.tree(rank))
        if found is not None:
            return tuple(found)
    return tuple(_actions(whole))


def _shortened(schedule: Schedule, least: int) -> Schedule | None:
    """The same schedule with about `least` micro-batches; None where that is not fewer, or not defined."""
    grouped = schedule.interleaves and schedule.chunks > 1
    unit = schedule.group if grouped else 2  # DualPipe's are even
    fewer = (schedule.micro_batches - least) // unit * unit
    if fewer < 1 or (grouped and schedule.micro_batches % schedule.group):
        return None
    others = {"chunks": schedule.chunks, **({"group": schedule.group} if grouped else {})}
    try:
        return type(schedule)(schedule.pp, schedule.micro_batches - fewer, **others)
    except UsageError:
        return None


def _folded(whole: Node, shorter: Node) -> list[Action | Turns] | None:
    """The order of `shorter` with the turns that `whole` has besides; None where they do not have the same parts."""
    match whole, shorter:
        case Leaf(), Leaf():
            alike = [(a.kind, a.chunk) for a in whole.actions] == [(a.kind, a.chunk) for a in shorter.actions]
            return list(map(_action, shorter.actions)) if alike else None
        case Seq(), Seq() if len(whole.parts) == len(shorter.parts):
            parts = [_folded(*pair) for pair in zip(whole.parts, shorter.parts, strict=True)]
            return None if None in parts else [action for part in parts for action in part or ()]
        case Repeat(), Repeat() if whole.stride == shorter.stride:
            return _folded_turns(whole, shorter)
    return None


def _folded_turns(whole: Repeat, shorter: Repeat) -> list[Action | Turns] | None:
    more = whole.count - shorter.count
    numbers = flat(shorter.body)[:, 2]
    enough = (shorter.count - APART) * shorter.stride >= int(numbers.max() - numbers.min())
    body = _folded(whole.body, shorter.body)
    if body is None or more < 0:
        return None
    if not more:
        return [part.later(turn * shorter.stride) for turn in range(shorter.count) for part in body]
    actions = tuple(part for part in body if isinstance(part, Action))
    if len(actions) < len(body) or not enough:
        return None
    return list(_turns(actions, shorter, more))


def _turns(actions: tuple[Action, ...], shorter: Repeat, more: int) -> Iterator[Action | Turns]:
    """All turns of `shorter`, the last but one of which stands for `more` others."""
    for turn in range(shorter.count):
        these = tuple(action.later(turn * shorter.stride) for action in actions)
        yield from (Turns(these, more + 1),) if turn == shorter.count - 2 else these


def _actions(node: Node) -> Iterable[Action]:
    kinds = tuple("FBIW")
    return (Action(kinds[kind], number, chunk) for kind, chunk, number, _ in flat(node).tolist())


def _action(scheduled: Scheduled) -> Action:
    return Action(scheduled.kind.name, scheduled.micro_batch, scheduled.chunk)
