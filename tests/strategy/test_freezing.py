"""Frozen weights: what they no longer need, where backward ends, what cannot be asked for."""

from __future__ import annotations

import attrs
import pytest

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.plan import apply, make_plan
from simulator.reading import read_model
from simulator.roles import Phase, Role
from simulator.timeline import moments
from strategies.bitfit import BitFit
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.freezing import Freezing
from tests.strategies import uniform_llama

TRAINING = Training(micro_batch=2, seq_len=64, weights=BF16)


class TestFreezing(StrategyContract):
    strategy = Freezing(layers=1, embeddings=True)


class TestFrozenFeedForwards(StrategyContract):
    strategy = Freezing(weights="mlp+*norm*")


class TestFrozenUnderCheckpointing(StrategyContract):
    strategy = Freezing(layers=1, embeddings=True)
    before = (FullCheckpointing(),)


class TestBitFit(StrategyContract):
    strategy = BitFit()

    def plans(self, mesh=None, *, unrolled=False):
        """The same plans, of a model whose projections have biases."""
        for plan in super().plans(mesh, unrolled=unrolled):
            mixers = [attrs.evolve(each.attention, bias=True) for each in plan.model.layers]
            layers = [attrs.evolve(plan.model.layers[0], token_mixer=each) for each in mixers]
            yield attrs.evolve(plan, model=attrs.evolve(plan.model, layers=tuple(layers)))


def backward_layers(*strategies):
    """Layers that backward visits."""
    steps = moments(simulate(uniform_llama(4), TRAINING, strategies).program.steady)
    return sorted({m.layer for m in steps if m.layer is not None and m.step.phase is Phase.BACKWARD})


def test_backward_ends_at_the_first_layer_that_is_trained():
    assert backward_layers() == [0, 1, 2, 3]
    assert backward_layers(Freezing(layers=2, embeddings=True)) == [2, 3]
    assert backward_layers(Freezing(layers=2)) == [0, 1, 2, 3]


def test_checkpointing_asks_for_the_gradient_of_the_embedded_tokens():
    """So backward runs through frozen layers, and recomputes them."""
    assert backward_layers(Freezing(layers=2, embeddings=True), FullCheckpointing()) == [0, 1, 2, 3]


def test_frozen_weights_have_no_gradient_and_no_state():
    whole, part = (
        simulate(uniform_llama(4), TRAINING, strategies).steady.by_role
        for strategies in ((), (Freezing(weights="*_proj"),))
    )
    assert part[Role.PARAMETER] == whole[Role.PARAMETER]
    assert part[Role.OPTIMIZER_STATE] < whole[Role.OPTIMIZER_STATE] / 2


def test_frozen_weights_save_nothing_for_their_gradients():
    """A linear layer saves its input for its weight's gradient alone."""
    plans = [apply(make_plan(uniform_llama(1), TRAINING), s) for s in ((), (Freezing(weights="down_proj"),))]
    saved = []
    for plan in plans:
        (op,) = (op for op in plan.graph.ops if op.module.endswith("down_proj") and op.name == "mm.default")
        saved.append({storage.role for storage in plan.graph.uses(op).saves})
    assert saved == [{Role.PARAMETER, Role.ACTIVATION}, {Role.PARAMETER}]


def test_bitfit_trains_biases_alone():
    plan = apply(make_plan(read_model("gpt2"), TRAINING), [BitFit()])
    trained = [t.storage.label for t in plan.graph.parameters if t.requires_grad]
    assert trained
    assert all(label.endswith(".bias") for label in trained)


@pytest.mark.parametrize(
    ("strategy", "match"),
    [
        (BitFit(), "'bitfit' trains biases, of which this llama has none"),
        (Freezing(weights="q_prj"), "'weights' must match some weight: 'q_prj'; there are model.embed_tokens.weight"),
        (Freezing(layers=3), "'layers' of freeze must be at most the model's 2 layers: 3"),
        (Freezing(weights="*"), "freeze leaves no weight to train"),
    ],
)
def test_what_cannot_be_frozen(strategy, match):
    with pytest.raises(UsageError, match=match.replace("*", r"\*")):
        simulate(uniform_llama(2), TRAINING, [strategy])


@pytest.mark.parametrize("order", [(Ddp(), Freezing(layers=1)), (Freezing(layers=1), Ddp())])
def test_not_with_weights_that_ranks_share(order):
    with pytest.raises(UnsupportedError, match="is not modelled"):
        simulate(uniform_llama(2), TRAINING, order, mesh=Mesh(dp_replicate=2))
