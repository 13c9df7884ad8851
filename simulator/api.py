"""The one call that does it all: model in, report out."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.lowering import lower
from simulator.model import ModelSpec
from simulator.plan import Strategy, apply, make_plan
from simulator.reading import read_model
from simulator.report import Report
from simulator.workload import Training


def simulate(model: ModelSpec | str, training: Training | None = None, strategies: Sequence[Strategy] = ()) -> Report:
    """Simulate one cold and one steady optimizer step on one device.

    Args:
        model: a spec, or what `read_model` takes: a preset name, a path to a config.json or its folder.
        training: the workload; its defaults are batch 1, 1024 tokens, fp32, foreach AdamW.
        strategies: techniques to apply, in order.

    Returns:
        A `Report` with both peaks, their breakdown, and the timeline on demand.

    Raises:
        UsageError: a model or option that is wrong, in one line.
        UnsupportedError: one that is right but not modelled.
    """
    spec = read_model(model) if isinstance(model, str) else model
    plan = apply(make_plan(spec, training or Training()), strategies)
    return Report(plan, lower(plan))
