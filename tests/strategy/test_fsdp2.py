"""FSDP2: what must hold of every plan, and the closed forms that must fall out."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Optimizer, Training, simulate
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.reading import read_model
from simulator.report import Report
from simulator.roles import Role
from simulator.timeline import LiveSet, moments
from strategies.checkpointing import FullCheckpointing
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from tests.strategies import fsdp2_options, meshes, model_specs, trainings, uniform_llama
from tests.strategy.kept import kept

some = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
FUSED = Optimizer(name="adamw", implementation="fused")


@some
@given(st.data(), model_specs(max_layers=7), trainings(), meshes(), st.booleans())
def test_plans_of_every_kind(data, model, training, mesh, checkpointing):
    """Repeats stand for every layer, nothing is allocated or freed twice, a steady step leaks nothing."""
    options = data.draw(fsdp2_options(mesh.dp_shard))
    strategies = [*([FullCheckpointing()] if checkpointing else []), options]
    try:
        plans = [make_plan(model, training, mesh=mesh, unrolled=unrolled) for unrolled in (False, True)]
        short, long = (Report(plan, lower(plan)) for plan in (apply(plan, strategies) for plan in plans))
    except UnsupportedError:
        return
    for one, other in ((short.cold, long.cold), (short.steady, long.steady)):
        assert one.nbytes == other.nbytes
        assert one.by_role == other.by_role
    live = LiveSet()
    for node in (short.program.load, short.program.cold, short.program.steady):
        for moment in moments(node):
            live.run(moment)
    assert short.steady.start_bytes == short.steady.end_bytes


@some
@given(model_specs(max_layers=7), meshes())
def test_shards_of_all_ranks_are_the_model_and_padding(model, mesh):
    """Each weight is padded to a multiple of the ranks along its first dimension, and so is its optimizer state."""
    training = Training(seq_len=8, weights=BF16, attention="eager")
    whole = simulate(model, training)
    sharded = simulate(model, training, [Fsdp2()], mesh=mesh)
    shards, plan = mesh.dp_shard, whole.plan
    padded = 0
    for tensor in plan.graph.parameters:
        rows = plan.dimensions.bindings
        first = 1
        for dim in tensor.shape[0] if tensor.shape else ():
            first *= dim if isinstance(dim, int) else rows[dim]
        elements = tensor.storage.size.elements(rows)
        repeats = 1 if tensor.storage.slot is None else plan.layout.places[tensor.storage.slot].repeats
        padded += repeats * elements // first * -(-first // shards) * shards
    assert kept(sharded)[Role.PARAMETER] * shards == 2 * padded
    assert kept(sharded)[Role.OPTIMIZER_STATE] * shards == 2 * 2 * padded
    assert kept(whole)[Role.PARAMETER] == 2 * whole.parameters <= 2 * padded


def test_strategies_that_commute():
    training = Training(micro_batch=2, seq_len=64, gradient_accumulation=3)
    mesh = Mesh(dp_replicate=2, dp_shard=4)
    both = (FullCheckpointing(), Fsdp2(param_dtype=BF16, reduce_dtype=FP32))
    reports = [simulate(uniform_llama(9), training, order, mesh=mesh) for order in itertools.permutations(both)]
    assert reports[0].cold.nbytes == reports[1].cold.nbytes
    assert reports[0].steady.by_role == reports[1].steady.by_role


@pytest.mark.parametrize("shards", [8, 64, 256])
@pytest.mark.parametrize(
    ("reshard", "tokens"), [(True, 512), (True, 4096), (True, 16384), (False, 4096), (False, 16384)]
)
def test_closed_forms_fall_out(shards, reshard, tokens):
    """Head and root moments of a checkpointed Llama in mixed precision, for instance ``(c + r) Pr`` at the root.

    w, c, r: bytes of the original, compute and reduce dtypes; P, Pl, Pr: parameters of model, layer and root; T tokens.
    """
    model, w, c, r = read_model("llama-3.1-8b"), 4, 2, 4
    training = Training(seq_len=tokens, optimizer=FUSED, kernel_workspace=False, keep_inputs=True)
    options = Fsdp2(param_dtype=BF16, reduce_dtype=FP32, reshard_after_forward=reshard)
    peak = simulate(model, training, [FullCheckpointing(), options], mesh=Mesh(dp_shard=shards)).steady.nbytes
    h, vocab, layers, d = model.hidden, model.vocab, len(model.layers), model.layers[0].attention.head_dim
    width, kv = model.layers[0].feed_forward.width, model.layers[0].attention.kv_heads * d
    layer = 2 * h * h + 2 * h * kv + 3 * h * width + 2 * h
    root = 2 * vocab * h + h
    whole = layers * layer + root
    static = 3 * w * whole / shards
    gathered = c * (root + (0 if reshard else layers * layer)) + (c * layer if reshard else 0)
    head = (
        static
        + 2 * tokens * h * layers
        + 8 * tokens * h
        + 4 * tokens * vocab
        + 4 * tokens * d
        + gathered
        + 8 * tokens * vocab
    )
    root_in = static + w * (whole - root) / shards + (c + r) * root
    root_out = static + w * (whole - root) / shards + r * root / shards + r * root + c * vocab * h
    assert peak == pytest.approx(max(head, root_in, root_out), rel=1e-4)


def test_an_unsharded_step_of_zero_3_costs_16_bytes_per_parameter_over_the_ranks():
    """Rajbhandari et al., section 3.1: fp32 weights, gradients and two moments, all over N (equation of figure 1)."""
    model = read_model("llama-3.2-1b")
    training = Training(seq_len=8, optimizer=FUSED)
    report = simulate(model, training, [Fsdp2()], mesh=Mesh(dp_shard=64))
    assert kept(report)[Role.PARAMETER] + kept(report)[Role.OPTIMIZER_STATE] == pytest.approx(
        12 * report.parameters / 64, rel=1e-3
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fsdp2(reshard_after_forward=-1), "reshard_after_forward"),
        (lambda: Fsdp2(wrap="block"), "wrap"),
        (lambda: Fsdp2(prefetch=-1), "prefetch"),
        (lambda: Fsdp2(param_dtype="bf16"), "param_dtype"),
        (
            lambda: Fsdp2(reshard_after_forward=3)(make_plan(uniform_llama(2), Training(), mesh=Mesh(dp_shard=8))),
            "2, 4",
        ),
        (
            lambda: apply(make_plan(uniform_llama(2), Training(), mesh=Mesh(dp_shard=8)), [Fsdp2(), Fsdp2()]),
            "choose one",
        ),
        (
            lambda: apply(make_plan(uniform_llama(2), Training(), mesh=Mesh(dp_shard=8)), [Ddp(), Fsdp2()]),
            "both own the weights",
        ),
    ],
)
def test_wrong_options_are_refused(make, said):
    with pytest.raises(UsageError, match=said):
        make()


def test_a_tied_weight_cannot_belong_to_two_units():
    with pytest.raises(UnsupportedError, match="tied"):
        simulate("llama-3.2-1b", Training(seq_len=8), [Fsdp2(wrap="layer+embedding+head")], mesh=Mesh(dp_shard=2))
