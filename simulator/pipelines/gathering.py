"""When the weights of a rank's stages are gathered and freed, if they are sharded.

Source: torch 2.13 torch/distributed/pipelining/schedules.py `_add_unshard_reshard`.
"""

from __future__ import annotations

from simulator.pipelines.pipeline import RESHARD, UNSHARD, Action, Turns

#: `max_active_stages`: stages whose weights a rank has gathered at once.
MOST_GATHERED = 3
#: Those actions are of a stage, not of a micro-batch.
_NO_MICRO_BATCH = -1


def with_gathering(order: tuple[Action | Turns, ...]) -> tuple[Action | Turns, ...]:
    """`order` with an action before each computation for which a stage's weights come or go.

    The next few stages that compute have theirs; a turn that stands for others finds and leaves what those do.
    """
    flat = [action for part in order for action in (part.actions if isinstance(part, Turns) else (part,))]
    before = _before(flat)
    found: list[Action | Turns] = []
    position = 0
    for part in order:
        actions = part.actions if isinstance(part, Turns) else (part,)
        with_others = [each for index, a in enumerate(actions) for each in (*before[position + index], a)]
        found += [Turns(tuple(with_others), part.count)] if isinstance(part, Turns) else with_others
        position += len(actions)
    return (*found, *before[position])


def _before(actions: list[Action]) -> list[list[Action]]:
    """What happens before each of `actions`, and after all of them."""
    gathered: list[int] = []
    found = []
    for following in _following(actions):
        gone = [chunk for chunk in gathered if chunk not in following]
        come = [chunk for chunk in following if chunk not in gathered]
        gathered = [*(chunk for chunk in gathered if chunk in following), *come]
        happens = [(RESHARD, gone), (UNSHARD, come)]
        found.append([Action(kind, _NO_MICRO_BATCH, chunk) for kind, chunks in happens for chunk in chunks])
    return [*found, [Action(RESHARD, _NO_MICRO_BATCH, chunk) for chunk in gathered]]


def _following(actions: list[Action]) -> list[list[int]]:
    """Of each action, the chunks that compute next, its own first (`next_stage_indices`)."""
    found: list[list[int]] = []
    nearest: list[int] = []
    for action in reversed(actions):
        nearest = [action.chunk, *(chunk for chunk in nearest if chunk != action.chunk)]
        found.append(nearest[:MOST_GATHERED])
    return found[::-1]
