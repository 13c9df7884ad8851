"""A framework's defaults as a table: option, value, source, and where each applies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from strategies import strategies
from studies.parallelism import TENSOR_PARALLEL

if TYPE_CHECKING:
    from hardware.errors import UsageError
    from simulator.model import ModelSpec
    from studies.options import TrainingOptions

#: Options that are written NAME,option=value,... and whose left-out options a default of the same name fills in.
_WITH_SETTINGS = ("optimizer", "checkpointing")


@attrs.frozen
class Situation:
    """What a default may depend on."""

    options: TrainingOptions
    """As they were typed."""
    model: ModelSpec
    world: int
    torch: tuple[int, int]

    @property
    def sharing(self) -> int:
        """Ranks that have data or sequences of their own."""
        return self.world // ((self.options.tp or 1) * (self.options.pp or 1))

    def gives(self, option: str) -> bool:
        """Whether `option` was typed."""
        if option == "checkpointing" and self.options.checkpoint_every is not None:
            return True
        return getattr(self.options, option) is not None

    def names_data_parallelism(self) -> bool:
        """Whether a strategy over the data-parallel ranks was typed."""
        return any(_is_data_parallel(_name(text)) for text in self.options.strategy)


@attrs.frozen
class Condition:
    """Where a default applies."""

    text: str
    holds: Callable[[Situation], bool]


ALWAYS = Condition("", lambda _: True)
ONE_GPU = Condition("one GPU", lambda where: where.world == 1)
SEVERAL_GPUS = Condition("several GPUs", lambda where: where.world > 1)
SEVERAL_RANKS = Condition("several data-parallel ranks", lambda where: where.sharing > 1)


@attrs.frozen
class Default:
    """The value of one option of ``vramsim estimate``, as one types it."""

    option: str
    value: Any
    source: str
    """File and function or class of the framework, with a date or version where it moved."""
    where: Condition = ALWAYS

    @property
    def typed(self) -> str:
        """As one would type it."""
        flag = f"--{self.option.replace('_', '-')}"
        return flag if self.value is True else f"{flag} {self.value}"


@attrs.frozen
class Note:
    """What is simulated otherwise than the framework has it, or what it leaves open."""

    text: str
    where: Condition = ALWAYS


@attrs.frozen
class Refusal:
    """Where a framework cannot be simulated without a further choice."""

    where: Condition
    error: type[UsageError]
    text: str


@attrs.frozen
class Profile:
    """What one framework does by default; sizes of batch and sequence are always the user's."""

    version: str
    """Release or commit, with its date, and the entry point."""
    defaults: tuple[Default, ...]
    """Of several for one option the first that applies."""
    notes: tuple[Note, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def fill(profile: Profile, where: Situation) -> tuple[TrainingOptions, list[str]]:
    """The options with `profile`'s defaults for those left out, and a line for each default and note.

    Raises:
        UsageError: as the profile's refusals say.
    """
    for refusal in profile.refusals:
        if refusal.where.holds(where):
            raise refusal.error(refusal.text)
    options, lines, done = where.options, [], set()
    for default in profile.defaults:
        if default.where.holds(where) and (default.option == "strategy" or default.option not in done):
            done.add(default.option)
            value, line = _apply(default, where, getattr(options, default.option))
            options = attrs.evolve(options, **{default.option: value})
            lines += [f"{line} ({default.source})"] if line else []
    if options.clip == 0:  # how every framework's own option switches clipping off
        options = attrs.evolve(options, clip=None)
    return options, [*lines, *(note.text for note in profile.notes if note.where.holds(where))]


def _apply(default: Default, where: Situation, given: Any) -> tuple[Any, str]:
    """The option's value, and what of it is the default's, as typed."""
    if default.option == "strategy":
        return _strategy(default, where, tuple(given))
    if not where.gives(default.option):
        return default.value, default.typed
    if default.option in _WITH_SETTINGS and given is not None and _name(given) == _name(default.value):
        text, added = _completed(given, default.value)
        return text, f"--{default.option} {_name(given)}: {added}" if added else ""
    return given, ""


def _strategy(default: Default, where: Situation, given: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """The strategies with the default one, unless another that does the same was typed; tensor parallelism first."""
    name = _name(default.value)
    for i, text in enumerate(given):
        if _name(text) == name:
            completed, added = _completed(text, default.value)
            return (*given[:i], completed, *given[i + 1 :]), f"--strategy {name}: {added}" if added else ""
    if _is_data_parallel(name) and where.names_data_parallelism():
        return given, ""
    first = name == TENSOR_PARALLEL
    return ((default.value, *given) if first else (*given, default.value)), default.typed


def _completed(given: str, default: str) -> tuple[str, str]:
    """`given` with those options of `default` that it leaves out, and these alone."""
    typed = {_key(setting) for setting in _settings(given)}
    added = ",".join(setting for setting in _settings(default) if _key(setting) not in typed)
    return (f"{given},{added}" if added else given), added


def _name(text: str) -> str:
    return text.split(",")[0]


def _settings(text: str) -> Sequence[str]:
    return text.split(",")[1:]


def _key(setting: str) -> str:
    return setting.partition("=")[0]


def _is_data_parallel(name: str) -> bool:
    return name in strategies.names() and str(getattr(strategies.get(name), "axis", "")).startswith("dp_")
