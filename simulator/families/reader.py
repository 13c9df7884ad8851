"""Reading a parsed config.json key by key, collecting what is wrong instead of stopping at it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, TypeVar

import attrs

from hardware.errors import UnsupportedError, UsageError, unknown_name
from simulator.limits import LARGEST_SOFTCAP, count_rule, is_count, is_number, shown

# Names of transformers 5.23.0 activations.py, ACT2CLS, without `prelu` and `xielu`: these two have
# parameters of their own, which no family here counts.
ACTIVATIONS = frozenset(
    (
        "gelu",
        "gelu_10",
        "gelu_accurate",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "hardswish",
        "laplace",
        "leaky_relu",
        "linear",
        "mish",
        "quick_gelu",
        "relu",
        "relu2",
        "relu6",
        "sigmoid",
        "silu",
        "sqrtsoftplus",
        "swish",
        "tanh",
    )
)
_SAME_KERNEL = {"swish": "silu"}
_ABSENT: Final = object()
_T = TypeVar("_T")


@attrs.define
class ConfigReader:
    """The keys of one config, checked as they are read.

    A method that finds its key wrong notes a problem and returns the class default, so that a
    family can read on and all problems reach the user together in one line.
    """

    values: Mapping[str, Any]
    name: str
    family: str
    config_class: str
    """The configuration class whose defaults apply, for the text of assumptions."""
    aliases: Mapping[str, str] = attrs.field(factory=dict)
    """Other names of keys, other -> own, as in the class's `attribute_map`."""
    complete: bool = True
    """Whether the sizes that make a model must be in the config (a config.json) or may be defaults."""
    read: set[str] = attrs.field(factory=set, init=False)
    assumptions: list[str] = attrs.field(factory=list, init=False)
    problems: list[UsageError] = attrs.field(factory=list, init=False)
    _wrong: set[str] = attrs.field(factory=set, init=False)
    _defaulted: set[str] = attrs.field(factory=set, init=False)
    _sections: list[ConfigReader] = attrs.field(factory=list, init=False)

    def section(self, key: str, config_class: str, aliases: Mapping[str, str] | None = None) -> ConfigReader:
        """The reader of the object under `key` (a ``text_config``): its problems and assumptions join this one's."""
        value = self._raw(key)
        if not isinstance(value, Mapping):
            self._problem(key, f"{key} must be an object, not {shown(None if value is _ABSENT else value)}", None)
            value = {}
        inner = ConfigReader(value, self.name, self.family, config_class, aliases or {}, self.complete)
        inner.assumptions, inner.problems = self.assumptions, self.problems
        self._sections.append(inner)
        return inner

    def required_size(self, key: str, default: int, largest: int) -> int:
        """A size that makes the model what it is: a config.json has to give it."""
        if self.complete and self._raw(key) is _ABSENT:
            self._defaulted.add(key)
            return self._problem(key, f"{self._names(key)} is missing and has no safe default: add it", default)
        return self.size(key, default, largest)

    def size(self, key: str, default: int, largest: int) -> int:
        """A positive integer up to `largest`."""
        value = self._given(key, default)
        if not is_count(value, largest):
            return self._problem(key, f"{key} {count_rule(largest)}, not {shown(value)}", default)
        return int(value)

    def choices(self, key: str, default: Sequence[int], known: Collection[int], length: int) -> list[int]:
        """One number per layer, each one of `known`; a longer list ends with what later parts use."""
        value = self._given(key, list(default))
        allowed = ", ".join(map(str, known))
        rule = f"{key} must be a list of {length} numbers out of {allowed}, not {shown(value)}"
        fits = isinstance(value, list) and len(value) >= length and all(each in known for each in value)
        return list(value[:length]) if fits else self._problem(key, rule, list(default))

    def indices(self, key: str, length: int) -> frozenset[int]:
        """Some of the numbers from 0 to `length` - 1, a list; null or nothing is none of them."""
        value = self._raw(key)
        if value is _ABSENT or value is None:
            return frozenset()
        fits = isinstance(value, list) and all(each == 0 or is_count(each, length - 1) for each in value)
        rule = f"{key} must be a list of numbers from 0 to {length - 1}, not {shown(value)}"
        return frozenset(value) if fits else self._problem(key, rule, frozenset())

    def derived_size(self, key: str, default: int, rule: str, largest: int) -> int:
        """A size that null, nothing or "auto" leaves to be derived by `rule`, text for the assumption."""
        if self._raw(key) in (_ABSENT, None, "auto"):
            self._default(key, default, rule)
            return default
        return self.size(key, default, largest)

    def optional_size(self, key: str, default: int | None, largest: int) -> int | None:
        """A size for which null, and nothing where the default is None, means that there is none."""
        if default is None and not self.given(key):
            return None
        return None if self._raw(key) is None else self.size(key, default or 1, largest)

    def count(self, key: str, default: int, largest: int) -> int:
        """A whole number from 0 to `largest`."""
        value = self._given(key, default)
        if value is not False and value == 0 and isinstance(value, int):
            return 0
        if not is_count(value, largest):
            return self._problem(key, f"{key} must be a whole number from 0 to {largest}, not {shown(value)}", default)
        return int(value)

    def nested_rate(self, groups: Sequence[str], key: str, default: float) -> float:
        """A proportion that stands in one of the objects `groups`, or else beside them."""
        for group in groups:
            inner = self.values.get(group)
            if isinstance(inner, Mapping) and key in inner:
                self.read.add(group)
                value = inner[key]
                if is_number(value, 0.0, 1.0):
                    return float(value)
                return self._problem(key, f"{group}.{key} must be a number from 0 to 1, not {shown(value)}", default)
        return self.rate(key, default)

    def flags(self, key: str, default: Sequence[bool], rule: str) -> list[bool]:
        """One flag per layer, as true and false or 1 and 0; null or nothing leaves the list to `rule`."""
        value = self._raw(key)
        if value is _ABSENT or value is None:
            self._default(key, rule, None)
            return list(default)
        right = isinstance(value, list | tuple) and len(value) >= len(default) and all(each in (0, 1) for each in value)
        if not right:
            rule = f"{key} must be a list of {len(default)} flags, 1 or 0, not {shown(value)}"
            return self._problem(key, rule, list(default))
        return [bool(each) for each in value[: len(default)]]

    def rate(self, key: str, default: float) -> float:
        """A probability."""
        return self._number(key, default, 0.0, 1.0)

    def softcap(self, key: str, default: float | None) -> float | None:
        """A positive cap; null, and nothing where the default is None, means that there is none."""
        if default is None and not self.given(key):
            return None
        return None if self._raw(key) is None else self._number(key, default or 1.0, 1e-9, LARGEST_SOFTCAP)

    def given(self, key: str) -> bool:
        """Whether `key` is there and not null."""
        return self._raw(key) not in (None, _ABSENT)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            return self._problem(key, f"{key} must be true or false, not {shown(value)}", default)
        return value

    def activation(self, key: str, default: str) -> str:
        """The name of an activation function; names of one kernel become one name."""
        value = self._given(key, default)
        if not isinstance(value, str):
            return self._problem(key, f"{key} must be the name of an activation, not {shown(value)}", default)
        if value not in ACTIVATIONS:
            return self._problem(key, f"{key}: {unknown_name('activation', value[:60], ACTIVATIONS)}", default)
        return _SAME_KERNEL.get(value, value)

    def names(self, key: str, default: Sequence[str], known: Collection[str], rule: str) -> list[str]:
        """One name per layer, each one of `known`; null or nothing leaves the list to `rule`."""
        value = self._raw(key)
        if value is _ABSENT or value is None:
            self._default(key, rule, None)
            return list(default)
        wrong = self._wrong_names(value, len(default), known)
        return self._problem(key, f"{key} {wrong}", list(default)) if wrong else list(value)

    def one_of(self, key: str, default: str, known: Sequence[str]) -> str:
        """One of the `known` names."""
        value = self._given(key, default)
        if isinstance(value, str) and value in known:
            return value
        return self._problem(key, f"{key} must be {' or '.join(known)}, not {shown(value)}", default)

    def kinds(self, key: str, known: Sequence[str], old_names: Mapping[str, str]) -> list[str]:
        """One name per layer, as many as there are; by default one layer of each of those `known`.

        Args:
            old_names: old name -> what it is called now.
        """
        if self.complete and not self.given(key):
            return self._problem(key, f"{self._names(key)} is missing and has no safe default: add it", list(known))
        value = self._given(key, list(known))
        named = [old_names.get(each, each) for each in value] if isinstance(value, list | tuple) and value else [""]
        wrong = self._wrong_names(named, len(named), known)
        return (
            self._problem(
                key, f"{key} must be a list of names out of {', '.join(known)}, not {shown(value)}", list(known)
            )
            if wrong
            else named
        )

    def letters(self, key: str, known: Collection[str]) -> str:
        """A pattern of one letter per layer; a config.json has to give it."""
        value = self._raw(key)
        if isinstance(value, str) and value and all(letter in known for letter in value):
            return value
        rule = f"{key} must be a text of the letters {' '.join(sorted(known))}, one per layer"
        return self._problem(key, f"{rule}, not {shown(None if value is _ABSENT else value)}", min(known))

    def refuse(self, key: str, harmless: Collection[object], way_out: str) -> None:
        """Refuse a key that changes memory and is not modelled, unless its value is harmless."""
        value = self._raw(key)
        if value is _ABSENT or any(value is each or (value == each and type(value) is type(each)) for each in harmless):
            return
        self._wrong.add(key)
        self.problems.append(UnsupportedError(f"{key}={shown(value)} is not modelled: {way_out}"))

    def check(self, holds: bool, problem: str, *keys: str) -> None:
        """Note `problem` unless it `holds`, or one of the `keys` it is about is wrong already."""
        if not holds and self._wrong.isdisjoint(keys):
            self.problems.append(UsageError(problem))

    def multiple(self, key: str, of: str, value: int, factor: int) -> None:
        """Note a problem unless `key`, which is `value`, divides by key `of`, which is `factor`."""
        self.check(value % factor == 0, f"{key} must be a multiple of {of}, not {value} and {factor}", key, of)

    def rotary(self, head_dim: int) -> None:
        """Note an odd `head_dim`: rotary embeddings turn pairs of channels."""
        self.check(head_dim % 2 == 0, f"head_dim must be even for rotary positions, not {head_dim}", "head_dim")

    def raise_problems(self) -> None:
        """Raise all problems as one error of one line; `UnsupportedError` where nothing else is wrong."""
        for reader in (self, *self._sections):
            reader._check_misspelled()
        if not self.problems:
            return
        unsupported = all(isinstance(each, UnsupportedError) for each in self.problems)
        text = f"{self.name}: {'; '.join(map(str, self.problems))} (correct the config of this {self.family} model)"
        raise UnsupportedError(text) if unsupported else UsageError(text)

    def _check_misspelled(self) -> None:
        """Note each unread key that looks like one a default stood in for: a silent default would lie."""
        unread = [key for key in self.values if key not in self.read]
        for key in sorted(self._defaulted):
            for near in difflib.get_close_matches(key, unread, n=1, cutoff=0.9):
                self._problem(key, f"{self.config_class} has no key {shown(near)}: did you mean {key!r}?", None)

    def _raw(self, key: str) -> Any:
        given = {each: self.values[each] for each in self._all_names(key) if each in self.values}
        self.read.update(given)
        if len({shown(value) for value in given.values()}) > 1 and key not in self._wrong:
            pairs = " and ".join(f"{each}={shown(value)}" for each, value in given.items())
            self._problem(key, f"{pairs} name one size twice: keep one", None)
        return next(iter(given.values()), _ABSENT)

    def _all_names(self, key: str) -> list[str]:
        return [key, *(other for other, own in self.aliases.items() if own == key)]

    def _names(self, key: str) -> str:
        return " (or ".join(self._all_names(key)) + ")" * (len(self._all_names(key)) - 1)

    def _given(self, key: str, default: Any) -> Any:
        value = self._raw(key)
        if value is not _ABSENT:
            return value
        self._default(key, default, None)
        return default

    def _default(self, key: str, value: object, rule: str | None) -> None:
        self._defaulted.add(key)
        text = str(value).lower() if isinstance(value, bool) else value
        self.assumptions.append(f"{key}: {text} ({self.config_class} default{f': {rule}' if rule else ''})")

    def _number(self, key: str, default: float, smallest: float, largest: float) -> float:
        value = self._given(key, default)
        if not is_number(value, smallest, largest):
            rule = f"must be a number from {smallest:g} to {largest:g}"
            return self._problem(key, f"{key} {rule}, not {shown(value)}", default)
        return float(value)

    def _wrong_names(self, value: object, length: int, known: Collection[str]) -> str | None:
        rule = f"must be a list of {length} names out of {', '.join(sorted(known))}"
        if not isinstance(value, list | tuple):
            return f"{rule}, not {shown(value)}"
        if len(value) != length:
            return f"{rule}, not of {len(value)}"
        wrong = [each for each in value if not (isinstance(each, str) and each in known)]
        return f"{rule}, not {shown(wrong[0])}" if wrong else None

    def _problem(self, key: str, text: str, placeholder: _T) -> _T:
        self._wrong.add(key)
        self.problems.append(UsageError(text))
        return placeholder
