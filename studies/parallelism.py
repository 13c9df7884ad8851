"""From ``--strategy``, ``--tp`` and their like to a mesh and strategies."""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from hardware.dtypes import TRAINING_DTYPES, DType
from hardware.errors import UsageError, unknown_name
from simulator.mesh import Mesh
from simulator.plan import Strategy
from strategies import StrategyFactory, strategies
from strategies.fsdp2 import Fsdp2

#: The strategy that shards over axis ``tp``.
TENSOR_PARALLEL = "tensor_parallel"
#: The strategy that shards sequences over axis ``cp``.
CONTEXT_PARALLEL = "context_parallel"


@attrs.frozen(kw_only=True)
class Degrees:
    """Degrees of parallelism as they are typed; None is what the user left out."""

    tp: int | None = None
    pp: int | None = None
    cp: int | None = None
    cp_comm: str | None = None
    ep: int | None = None
    dp_replicate: int | None = None
    dp_shard: int | None = None


def parallelise(
    texts: Sequence[str], degrees: Degrees, world: int
) -> tuple[Mesh, tuple[Strategy, ...], tuple[str, ...]]:
    """Mesh, strategies and what was assumed about them.

    Args:
        texts: each ``NAME[,option=value...]``.
        world: how many GPUs there are.

    Raises:
        UsageError: degrees that do not multiply to `world`, an unknown strategy, or ranks that no strategy uses.
    """
    for axis, degree in attrs.asdict(degrees).items():
        if isinstance(degree, int) and degree < 1:
            raise UsageError(
                f"'{axis.replace('_', '-')}' must be a whole number from 1 on: {degree}; leave it out for 1"
            )
    chosen = [parse_strategy(text) for text in texts]
    _once(chosen)
    _add_context_parallel(degrees, chosen)
    tp = degrees.tp or 1
    if tp > 1 and not any(strategy.name == TENSOR_PARALLEL for strategy in chosen):
        chosen.insert(0, strategies.get(TENSOR_PARALLEL)())
    if (degrees.pp or 1) > 1:
        chosen = [_in_stages(strategy, texts) for strategy in chosen]
    mesh = _mesh(degrees, world, chosen)
    _all_ranks_used(mesh, chosen)
    mesh = attrs.evolve(mesh, ep=degrees.ep or 1)
    return mesh, tuple(chosen), tuple(_assumed(strategy, texts) for strategy in chosen if _fields(type(strategy)))


#: What torchtitan's `apply_fsdp` gives `fully_shard` in a pipeline, and what torch's schedules do, unless given.
_FSDP2_IN_STAGES: dict[str, Any] = {"wrap": "layer+embedding+head", "reshard_after_forward": False, "sync": "last"}


def _in_stages(strategy: Strategy, texts: Sequence[str]) -> Strategy:
    """`strategy` inside the stages of a pipeline: options that were not given are torchtitan's there."""
    if not isinstance(strategy, Fsdp2):
        return strategy
    given = _given(strategy, texts)
    return attrs.evolve(strategy, **{name: value for name, value in _FSDP2_IN_STAGES.items() if name not in given})


def _add_context_parallel(degrees: Degrees, chosen: list[Strategy]) -> None:
    """The strategy that ``--cp`` stands for, with ``--cp-comm`` as its option, unless it is named already."""
    named = any(strategy.name == CONTEXT_PARALLEL for strategy in chosen)
    if degrees.cp_comm is not None and (named or (degrees.cp or 1) == 1):
        way = "write communication=... in --strategy" if named else "give --cp 2 or more, too, or leave it out"
        raise UsageError(f"'cp-comm' {degrees.cp_comm} has nothing to do; {way}")
    if (degrees.cp or 1) > 1 and not named:
        options = {} if degrees.cp_comm is None else {"communication": degrees.cp_comm}
        chosen.insert(0, strategies.get(CONTEXT_PARALLEL)(**options))


def _once(chosen: Sequence[Strategy]) -> None:
    names = [strategy.name for strategy in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"'strategy' must name {twice!r} once")


def axis_of(strategy: Strategy) -> str | None:
    """The mesh axis whose ranks `strategy` makes use of; None for techniques of one device."""
    axis: str | None = getattr(strategy, "axis", None)
    return axis


def _mesh(degrees: Degrees, world: int, chosen: Sequence[Strategy]) -> Mesh:
    """The degrees given, and the data-parallel one that is left for the strategy that uses it."""
    tp, pp, cp = degrees.tp or 1, degrees.pp or 1, degrees.cp or 1
    left = world
    for axis, degree in (("tp", tp), ("pp", pp), ("cp", cp)):
        if left % degree:
            among = f"the {world} GPUs" if left == world else f"the {left} of {world} GPUs that are left"
            raise UsageError(f"{axis!r} must divide {among}: {degree}; {_nearest(degree, left)}")
        left //= degree
    shards = any(axis_of(strategy) == "dp_shard" for strategy in chosen)
    replicate, shard = degrees.dp_replicate, degrees.dp_shard
    if shards:
        replicate = replicate or (left // shard if shard and left % shard == 0 else 1)
        shard = shard or max(1, left // replicate)
    else:
        shard = shard or 1
        replicate = replicate or max(1, left // shard)
    mesh = Mesh(pp=pp, dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp)
    if mesh.world != world:
        factors = " x ".join(f"{axis} {degree}" for axis, degree in mesh.degrees.items())
        wrong = "dp_replicate" if degrees.dp_replicate else "dp_shard"
        others = mesh.world // getattr(mesh, wrong)
        way = _nearest(getattr(mesh, wrong), world // others) if world % others == 0 else "change one degree"
        raise UsageError(f"'gpus' are {world}, but {factors} = {mesh.world} ranks; for {wrong} {way}")
    return mesh


def _nearest(value: int, whole: int) -> str:
    """The divisors of `whole` around `value`."""
    divisors = sorted({d for k in range(1, math.isqrt(whole) + 1) if whole % k == 0 for d in (k, whole // k)})
    below = [d for d in divisors if d <= value][-1:]
    above = [d for d in divisors if d > value][:1]
    return f"the nearest that work: {', '.join(map(str, below + above))}"


def _all_ranks_used(mesh: Mesh, chosen: Sequence[Strategy]) -> None:
    """Every axis above 1 has a strategy; HSDP's replicas belong to the one that shards."""
    used = {axis_of(strategy) for strategy in chosen}
    for axis in ("dp_replicate", "dp_shard"):
        if getattr(mesh, axis) > 1 and not used & {axis, "dp_shard"}:
            raise UsageError(
                f"'strategy' must say how {mesh.dp} data-parallel ranks share the work ({mesh}): "
                f"{', '.join(name for name in strategies.names() if _data_parallel(name))}"
            )
    if mesh.cp > 1 and not any(str(axis).startswith("dp_") for axis in used):
        raise UsageError(
            f"'strategy' must say how the gradients of {mesh.cp} ranks along cp are summed: "
            f"{', '.join(name for name in strategies.names() if _data_parallel(name))}"
        )
    for strategy in chosen:
        own = axis_of(strategy)
        if own in ("tp", "cp") and getattr(mesh, own) == 1:
            raise UsageError(f"'strategy' {strategy.name} needs several ranks along {own}: give --{own} 2 or more")
    idle = [s.name for s in chosen if axis_of(s) and getattr(mesh, str(axis_of(s))) == 1 and mesh.world == 1]
    idle = [name for name in idle if not getattr(strategies.get(name), "on_one_gpu", False)]
    if idle:
        raise UsageError(f"'strategy' {idle[0]} needs several GPUs: give --gpus a count, e.g. 8xh100-80")


def _data_parallel(name: str) -> bool:
    return str(getattr(strategies.get(name), "axis", "")).startswith("dp_")


# the words of one strategy --------------------------------------------------------------------------------------------


def parse_strategy(text: str) -> Strategy:
    """``NAME[,option=value...]``, for instance ``fsdp2,param_dtype=bf16,reduce_dtype=fp32``.

    Raises:
        UsageError: an unknown name or option, or a value that the option does not take.
    """
    name, *settings = text.split(",")
    factory = strategies.get(name)
    known = _fields(factory)
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"'strategy' options are written NAME,option=value,...: {setting!r}")
        if key not in known:
            raise unknown_name(f"option of {name}", key, known) if known else _without_options(name, key)
        if key in values:
            raise UsageError(f"'strategy' must name {key!r} once: {text!r}")
        values[key] = _typed(key, value, known[key])
    return factory(**values)


def _without_options(name: str, key: str) -> UsageError:
    return UsageError(f"'strategy' {name} has no options: {key!r}; leave it out")


def _fields(factory: StrategyFactory) -> dict[str, Any]:
    """The options that users may set, by name, with their types."""
    if not isinstance(factory, type) or not attrs.has(factory):
        return {}
    hints = typing.get_type_hints(factory)
    return {field.name: hints[field.name] for field in attrs.fields(factory) if "help" in field.metadata}


def _typed(key: str, text: str, hint: Any) -> Any:
    """The value that `text` stands for: the first of the option's types that it can be."""
    kinds = typing.get_args(hint) or (hint,)
    for kind in kinds:
        value = _READERS[kind](text) if kind in _READERS else None
        if value is not None:
            return value
    if type(None) in kinds and text == "none":
        return None
    forms = [_FORMS[kind] for kind in kinds if kind in _FORMS]
    raise UsageError(f"{key!r} must be {' or '.join(forms)}: {text!r}")


def _whole(text: str) -> int | None:
    """A whole number; ``5e8`` is one too, as people write bucket sizes."""
    try:
        number = float(text)
    except ValueError:
        return None
    whole = abs(number) < 2**62 and number == int(number)
    return (int(text) if text.lstrip("+-").isdigit() else int(number)) if whole else None


def _fraction(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_READERS: dict[Any, Callable[[str], Any]] = {
    bool: {"true": True, "false": False}.get,
    int: _whole,
    float: _fraction,
    str: str,
    DType: TRAINING_DTYPES.get,
}
_FORMS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    DType: f"one of {', '.join(TRAINING_DTYPES)}",
    type(None): "none",
}


def _assumed(strategy: Strategy, texts: Sequence[str]) -> str:
    """The options of `strategy` that were left out, as one would type them."""
    given = _given(strategy, texts)
    left_out = [key for key in _fields(type(strategy)) if key not in given]
    shown = ",".join(f"{key}={as_typed(getattr(strategy, key))}" for key in left_out)
    return f"options of --strategy {strategy.name}: {shown or 'all given'}"


def _given(strategy: Strategy, texts: Sequence[str]) -> set[str]:
    """The options of `strategy` that were typed."""
    return {setting.partition("=")[0] for text in texts for setting in text.split(",")[1:] if _names(text, strategy)}


def _names(text: str, strategy: Strategy) -> bool:
    return text.split(",")[0] == strategy.name


def as_typed(value: Any) -> str:
    """`value` of an option as one would type it."""
    if isinstance(value, DType):
        return next((name for name, dtype in TRAINING_DTYPES.items() if dtype == value), value.name)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
