"""The one call that does it all: model in, report out."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from simulator.lowering import lower, lower_ranks
from simulator.mesh import Mesh
from simulator.model import ModelSpec
from simulator.plan import Strategy, apply, make_plan
from simulator.reading import read_model
from simulator.report import Folding, Report
from simulator.workload import Training


def simulate(
    model: ModelSpec | str,
    training: Training | None = None,
    strategies: Sequence[Strategy] = (),
    *,
    mesh: Mesh | None = None,
    rank: int = 0,
) -> Report:
    """Simulate one cold and one steady optimizer step on one rank.

    Args:
        model: a spec, or what `read_model` takes: a preset name, a path to a config.json or its folder.
        training: the workload; its defaults are batch 1, 1024 tokens, fp32, foreach AdamW.
        strategies: techniques to apply, in order.
        mesh: degrees of parallelism, for strategies that use several ranks; by default one device.
        rank: the data-parallel rank to simulate, where ranks differ.

    Returns:
        A `Report` with both peaks, their breakdown, and the timeline on demand.

    Raises:
        UsageError: a model or option that is wrong, in one line.
        UnsupportedError: one that is right but not modelled.
    """
    spec = read_model(model) if isinstance(model, str) else model
    with _paused_collection():
        plan = apply(make_plan(spec, training or Training(), mesh=mesh, rank=rank), strategies)
        return Report(plan, lower(plan))


def simulate_ranks(
    model: ModelSpec, training: Training, ranks: Sequence[Sequence[Strategy]], *, mesh: Mesh | None = None
) -> list[Report]:
    """Like `simulate`, for several ranks of a pipeline: what they have in common is lowered and folded once.

    Args:
        model: the whole model.
        training: the workload.
        ranks: of each rank, all strategies in order; those of pipelines differ.
        mesh: degrees of parallelism.

    Returns:
        A report of each rank.
    """
    with _paused_collection():
        plans = [apply(make_plan(model, training, mesh=mesh), strategies) for strategies in ranks]
        foldings: dict[int, Folding] = {}
        reports = []
        for plan, program in zip(plans, lower_ranks(plans), strict=True):
            # ranks whose parts are the same load the same
            reports.append(Report(plan, program, foldings.setdefault(id(program.load), Folding())))
        return reports


@contextmanager
def _paused_collection() -> Iterator[None]:
    """Keep Python's cycle collector out of the way: everything built here stays alive, so it would only cost time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
