"""The contract every strategy passes, ours or a third party's: subclass `StrategyContract` in a test module.

    class TestMine(StrategyContract):
        strategy = MyStrategy()

pytest collects the inherited tests; nothing here needs pytest itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import ClassVar

import attrs

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError
from simulator.lowering import lower
from simulator.mesh import Mesh
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.plan import Plan, Strategy, apply, make_plan
from simulator.report import Report, StepPeak
from simulator.timeline import LiveSet, moments, timeline
from simulator.workload import Training


class StrategyContract:
    """What must hold for one strategy on small plans of every kind; set `strategy` in a subclass."""

    strategy: ClassVar[Strategy]
    mesh: ClassVar[Mesh] = Mesh()
    """Degrees of parallelism to try it on."""
    before: ClassVar[Sequence[Strategy]] = ()
    """Strategies that it needs before it."""
    axis: ClassVar[str | None] = None
    """The mesh axis over which it shards, if any: more ranks on it may then never need more memory to stay."""

    def plans(self, mesh: Mesh | None = None, *, unrolled: bool = False) -> Iterator[Plan]:
        """Plans to try it on: few and many layers, one and several micro-batches, fp32, bf16 and autocast."""
        for layers in (1, 2, 9):
            for training in (
                Training(micro_batch=2, seq_len=16, weights=BF16),
                Training(micro_batch=2, seq_len=16, gradient_accumulation=2, weights=FP32),
                Training(micro_batch=2, seq_len=16, gradient_accumulation=4, weights=FP32, autocast=BF16),
                Training(micro_batch=2, seq_len=16, gradient_accumulation=2, weights=BF16, zero_grad="zero"),
            ):
                plan = make_plan(_model(layers), training, mesh=mesh or self.mesh, unrolled=unrolled)
                with suppress(UnsupportedError):
                    yield apply(plan, self.before)

    def applied(self, mesh: Mesh | None = None, *, unrolled: bool = False) -> Iterator[tuple[Plan, Plan]]:
        """Each plan before and after; combinations that the strategy refuses are left out."""
        for plan in self.plans(mesh, unrolled=unrolled):
            with suppress(UnsupportedError):
                yield plan, apply(plan, [self.strategy])

    def test_applies_to_something(self) -> None:
        """It does not refuse everything."""
        assert any(True for _ in self.applied())

    def test_has_a_name_for_users(self) -> None:
        """The name is lower case words joined by underscores, and it is recorded in the plan."""
        name = self.strategy.name
        assert name.replace("_", "").isalnum()
        assert name == name.lower()
        for _, after in self.applied():
            assert after.applied[-1] == name

    def test_leaves_the_plan_it_was_given_alone(self) -> None:
        """The plan before is the same before and after: graph, edges, storages and policy."""
        for plan in self.plans():
            before = _fingerprint(plan)
            with suppress(UnsupportedError):
                apply(plan, [self.strategy])
            assert _fingerprint(plan) == before

    def test_applying_it_is_repeatable(self) -> None:
        """The same plan gives the same peaks every time."""
        for plan, after in self.applied():
            again = apply(plan, [self.strategy])
            assert _peaks(after) == _peaks(again)

    def test_folding_equals_unrolling(self) -> None:
        """The peaks of the program are those of its timeline."""
        for _, after in self.applied():
            program = lower(after)
            report = Report(after, program)
            parts = {"load": program.load, "cold": program.cold, "steady": program.steady}
            unrolled = timeline(parts, program.bindings)
            cold, steady = unrolled.marks["cold"], unrolled.marks["steady"]
            assert report.cold.nbytes == unrolled.total[cold:steady].max()
            assert report.steady.nbytes == unrolled.total[steady:].max()

    def test_repeats_stand_for_every_layer(self) -> None:
        """Building a few turns of each pattern gives what building every layer gives."""
        for (_, short), (_, long) in zip(self.applied(), self.applied(unrolled=True), strict=True):
            for one, other in zip(_steps(short), _steps(long), strict=True):
                assert one.nbytes == other.nbytes
                assert one.by_role == other.by_role
                assert (one.start_bytes, one.end_bytes) == (other.start_bytes, other.end_bytes)

    def test_nothing_is_allocated_or_freed_twice(self) -> None:
        """Every event of the unrolled program fits the live set it meets."""
        for _, after in self.applied():
            program, live = lower(after), LiveSet()
            for node in (program.load, program.cold, program.steady):
                for moment in moments(node):
                    live.run(moment)

    def test_more_ranks_never_hold_more(self) -> None:
        """Doubling the axis it shards over raises no rank's bytes between steps."""
        if self.axis is None:
            return
        doubled = attrs.evolve(self.mesh, **{self.axis: 2 * getattr(self.mesh, self.axis)})
        for (_, few), (_, many) in zip(self.applied(), self.applied(doubled), strict=True):
            for one, other in zip(_steps(few), _steps(many), strict=True):
                assert other.end_bytes <= one.end_bytes

    def test_a_steady_step_leaks_nothing(self) -> None:
        """A steady step ends with what it began with."""
        for _, after in self.applied():
            report = Report(after, lower(after))
            assert report.steady.start_bytes == report.steady.end_bytes


def _model(layers: int) -> ModelSpec:
    layer = LayerSpec(AttentionSpec(heads=4, kv_heads=2, head_dim=8), FeedForwardSpec(width=48))
    return ModelSpec("contract", "llama", hidden=32, vocab=128, max_positions=64, layers=(layer,) * layers)


def _steps(plan: Plan) -> tuple[StepPeak, StepPeak]:
    report = Report(plan, lower(plan))
    return report.cold, report.steady


def _fingerprint(plan: Plan) -> tuple[object, ...]:
    edges = tuple((id(a), id(b), tuple(sorted(why))) for a, b, why in plan.graph.edges.edges(data=True))
    storages = tuple((n.label, n.size, n.role) for n in plan.graph.edges if hasattr(n, "size"))
    return edges, storages, plan.recomputed, plan.applied, dict(plan.dimensions.bindings)


def _peaks(plan: Plan) -> list[int]:
    return [step.nbytes for step in _steps(plan)]
