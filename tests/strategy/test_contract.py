"""Our strategies, and a third party's found through an entry point, pass the shipped contract."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path

import attrs
import pytest

from hardware.dtypes import BF16, FP16, FP32
from simulator import Mesh, Training, simulate
from simulator.plan import Plan
from strategies import strategies
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from strategies.tensor_parallel import TensorParallel
from strategies.zero_redundancy import ZeroRedundancy
from tests.strategies import uniform_llama


@attrs.frozen
class EveryOther:
    """A third party's strategy: recompute every other layer."""

    name: str = "every_other"

    def __call__(self, plan: Plan) -> Plan:
        return attrs.evolve(plan, recomputed=frozenset(range(0, len(plan.model.layers), 2)))


@pytest.mark.parametrize("name", [n for n in strategies.names() if getattr(strategies.get(n), "axis", None)])
def test_checkpointing_commutes_with(name):
    """What is recomputed and who holds the weights do not depend on which was said first."""
    made = strategies.get(name)()
    rest = (Ddp(),) if name == "zero_redundancy" else ()
    mesh = Mesh(**{made.axis: 2})
    training = Training(micro_batch=2, seq_len=64, weights=FP16 if name == "gemini" else BF16)
    orders = ((FullCheckpointing(), *rest, made), (*rest, made, FullCheckpointing()))
    one, other = (simulate(uniform_llama(5), training, order, mesh=mesh) for order in orders)
    assert one.cold.by_role == other.cold.by_role
    assert one.steady.by_role == other.steady.by_role
    assert set(one.plan.assumptions) == set(other.plan.assumptions)


class TestFullCheckpointing(StrategyContract):
    strategy = FullCheckpointing()


class TestFsdp2(StrategyContract):
    strategy = Fsdp2(param_dtype=BF16, reduce_dtype=FP32, prefetch=2)
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


class TestDdp(StrategyContract):
    strategy = Ddp()
    mesh = Mesh(dp_replicate=4)


class TestDdpViews(StrategyContract):
    strategy = Ddp(gradient_as_bucket_view=True)
    mesh = Mesh(dp_replicate=4)


class TestZeroRedundancy(StrategyContract):
    strategy = ZeroRedundancy(parameters_as_bucket_view=True)
    mesh = Mesh(dp_replicate=4)
    before = (Ddp(),)


class TestTensorParallel(StrategyContract):
    strategy = TensorParallel()
    mesh = Mesh(tp=2)


class TestEveryOther(StrategyContract):
    strategy = EveryOther()


def test_a_strategy_is_found_through_its_entry_point(monkeypatch):
    point = EntryPoint("every_other", "tests.strategy.test_contract:EveryOther", "vramsim.strategies")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: [point] if group == point.group else [])
    fresh = type(strategies)(strategies.kind, strategies.group)
    assert fresh.get("every_other")().name == "every_other"


def test_every_registered_strategy_is_under_contract():
    for path in Path(__file__).parent.glob("test_*.py"):
        import_module(f"tests.strategy.{path.stem}")
    tested = {case.strategy.name for case in StrategyContract.__subclasses__()}
    assert set(strategies.names()) <= tested


def test_the_contract_can_fail():
    """A strategy that changes the plan it was given is caught."""

    class Vandal:
        name = "vandal"

        def __call__(self, plan: Plan) -> Plan:
            edges = plan.graph.edges
            edges.remove_edge(*next(iter(edges.edges)))
            return plan

    class Case(StrategyContract):
        strategy = Vandal()

    with pytest.raises(AssertionError):
        Case().test_leaves_the_plan_it_was_given_alone()


def test_checkpointing_saves_activations_and_recomputes():
    training = Training(micro_batch=4, seq_len=64)
    plain = simulate(uniform_llama(12), training)
    checkpointed = simulate(uniform_llama(12), training, [FullCheckpointing()])
    assert checkpointed.peak.nbytes < plain.peak.nbytes
    assert checkpointed.plan.applied == ("full_checkpointing",)
