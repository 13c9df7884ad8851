"""The words of ``--prune``, and what pruning saves: parameters, bytes of every kind, and the peak."""

from __future__ import annotations

import re
from collections.abc import Sequence

import attrs

from hardware.errors import UsageError
from simulator.limits import LARGEST_LAYERS
from simulator.plan import Strategy
from simulator.report import Report
from simulator.roles import Role
from strategies.pruning import prunings

#: The structure that is named by indices instead of an amount, and the one that is as large in every layer.
LAYERS, HIDDEN = "layers", "hidden"
_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_FORM = "'prune' is written STRUCTURE=AMOUNT[@LAYERS] such as heads=4, channels=25%@0,4-7, or layers=2,5-7"


def parse_prunings(texts: Sequence[str]) -> tuple[Strategy, ...]:
    """The techniques that `texts` stand for; whole layers go last, so that all indices are those of the model.

    Raises:
        UsageError: an unknown structure, one that is named twice for the same layers, or a value that is wrong.
    """
    made: list[tuple[str, Strategy]] = []
    for text in texts:
        name, technique = _parse(text)
        if any(_overlap(technique, other) for known, other in made if known == name):
            raise UsageError(f"'prune' must name a structure once for each layer: {text!r} names one again")
        made.append((name, technique))
    return tuple(technique for _, technique in sorted(made, key=lambda pair: pair[0] == LAYERS))


def _overlap(one: Strategy, other: Strategy) -> bool:
    layers = [getattr(each, "layers", None) for each in (one, other)]
    return None in layers or not set(layers[0] or ()).isdisjoint(layers[1] or ())


def _parse(text: str) -> tuple[str, Strategy]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{_FORM}: {text!r}")
    factory = prunings.get(name)
    if name == LAYERS:
        return name, factory(parse_layers(value))
    amount, at, layers = value.partition("@")
    if name == HIDDEN:
        if at:
            raise UsageError(f"'prune' hidden is one size for all layers: leave out '@{layers}'")
        return name, factory(amount)
    return name, factory(amount, parse_layers(layers) if at else None)


def parse_layers(text: str) -> tuple[int, ...]:
    """Indices such as ``2,5-7``; both ends of a range belong to it."""
    found: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < LARGEST_LAYERS:
            raise UsageError(f"layers are written as indices and ranges such as 2,5-7: {text!r}")
        found += range(first, last + 1)
    return tuple(found)


@attrs.frozen
class Saving:
    """One quantity before and after pruning."""

    name: str
    before: int
    after: int
    is_bytes: bool = True

    @property
    def saved(self) -> int:
        """How much less there is."""
        return self.before - self.after


#: What a rank keeps for its weights, beside which activations are not told apart.
_KINDS = {
    "weights": (Role.PARAMETER, Role.MASTER_WEIGHT),
    "gradients": (Role.GRADIENT, Role.BUCKET),
    "optimizer states": (Role.OPTIMIZER_STATE,),
}


def savings(before: Report, after: Report) -> list[Saving]:
    """What the pruned run needs less of: parameters, the most at any time of each kind of bytes, and the peak."""
    rows = [Saving("parameters", before.parameters, after.parameters, is_bytes=False)]
    most = [_most(report) for report in (before, after)]
    rows += [Saving(name, most[0][name], most[1][name]) for name in _KINDS]
    return [*rows, Saving("peak", before.peak.nbytes, after.peak.nbytes)]


def _most(report: Report) -> dict[str, int]:
    """The most bytes of each kind at any time of the first two steps."""
    line = report.timeline()
    columns = {name: [line.roles.index(role) for role in roles] for name, roles in _KINDS.items()}
    return {name: int(line.nbytes[:, places].sum(axis=1).max()) for name, places in columns.items()}
