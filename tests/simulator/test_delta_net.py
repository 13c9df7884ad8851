"""Gated delta nets: few turns of the loop over chunks stand for all of them, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Training
from simulator.blocks import delta_rule
from simulator.lowering import lower
from simulator.mesh import Mesh
from simulator.model import DeltaNetSpec
from simulator.plan import apply, make_plan
from simulator.reading import read_model, spec_from_class
from simulator.report import Report
from simulator.sizes import RepeatedSize, size_of, symbol
from simulator.timeline import moments
from strategies.checkpointing import FullCheckpointing
from strategies.tensor_parallel import TensorParallel
from tests.simulator.naive import NaiveMicroBatches
from tests.strategies import delta_models

some = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow])
lengths = st.integers(1, 700) | st.integers(1, 11).map(lambda chunks: chunks * delta_rule.CHUNK)
regimes = st.sampled_from([(FP32, None), (BF16, None), (FP32, BF16)])
choices = st.sampled_from([(), (FullCheckpointing(),)])
MOST_CHUNKS = 11


def report_of(model, training, strategies=(), *, built=delta_rule.BUILT_TURNS, unrolled=False):
    """A report, in which so many turns of each loop are built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_rule, "BUILT_TURNS", built)
        plan = apply(make_plan(model, training, unrolled=unrolled), strategies)
        return Report(plan, lower(plan))


@some
@given(delta_models(), lengths, st.integers(1, 3), regimes, choices)
def test_few_turns_stand_for_every_chunk(model, seq_len, batch, regime, strategies):
    """Building four turns of the loop over chunks, and few layers, gives the peaks of building all of them."""
    training = Training(micro_batch=batch, seq_len=seq_len, weights=regime[0], autocast=regime[1])
    short = report_of(model, training, strategies)
    long = report_of(model, training, strategies, built=MOST_CHUNKS, unrolled=True)
    for one, other in ((short.cold, long.cold), (short.steady, long.steady)):
        assert one.nbytes == other.nbytes
        assert one.by_role == other.by_role
        assert (one.start_bytes, one.end_bytes) == (other.start_bytes, other.end_bytes)


@some
@given(delta_models(), lengths, st.integers(1, 2), regimes)
def test_naive_interpreter_agrees(model, seq_len, batch, regime):
    """Python's own reference counts see the same live bytes at every op of forward and backward."""
    training = Training(micro_batch=batch, seq_len=seq_len, weights=regime[0], autocast=regime[1])
    expected = NaiveMicroBatches(make_plan(model, training, unrolled=True)).run()
    program = lower(make_plan(model, training))
    assert expected == born(program)[: len(expected)]


def born(program):
    """Live bytes after every op of the first step that makes a tensor, if only an empty one."""
    found, live = [], 0
    for part in (program.load, program.cold):
        found.clear()
        for moment in moments(part):
            live += sum(int(r.storage.size.allocated(program.bindings)) for r in moment.step.births)
            found += [live] if moment.step.births else []
            live -= sum(int(r.storage.size.allocated(program.bindings)) for r in moment.step.deaths)
    return found


@some
@given(st.integers(1, 10**6), st.lists(st.integers(0, 10**5), min_size=1))
def test_each_of_many_allocations_is_rounded(elements, counts):
    """So many allocations, each a multiple of 512 bytes: as ints, as an array and as a symbol."""
    size = RepeatedSize(size_of(("n",), 32), "count")
    one = size.each.allocated({"n": elements})
    array = size.allocated({"n": elements, "count": np.array(counts)})
    formula = size.allocated({"n": elements, "count": symbol("count")})
    for index, count in enumerate(counts):
        bindings = {"n": elements, "count": count}
        assert count * one == size.allocated(bindings) == array[index] == formula.subs({symbol("count"): count})
        assert size.nbytes(bindings) == 4 * size.elements(bindings) == 4 * count * elements


@pytest.mark.parametrize("preset", ["Qwen3-Next-80B-A3B-Instruct", "Qwen3.5-27B"])
def test_length_costs_nothing(preset):
    """A hundred thousand tokens build the graph of a thousand."""
    model = read_model(preset)
    built = [len(make_plan(model, Training(seq_len=length, weights=BF16)).graph.ops) for length in (1000, 100_000)]
    assert built[0] == built[1]


def test_the_path_that_is_modelled_is_named():
    assert any("flash-linear-attention" in line for line in read_model("Qwen3.5-27B").assumptions)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"layer_types": ["linear_attention"] * 2}, UsageError, "layer_types must have one full_attention"),
        ({"linear_num_value_heads": 3, "linear_num_key_heads": 2}, UsageError, "must be a multiple of"),
        (
            {"output_router_logits": True, "mlp_only_layers": [0]},
            UnsupportedError,
            "output_router_logits=true is not modelled",
        ),
    ],
)
def test_configs_that_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        spec_from_class("Qwen3NextConfig", {"num_hidden_layers": 2, "full_attention_interval": 2, **config}, "m")


def test_value_heads_come_in_groups():
    with pytest.raises(UsageError, match="value_heads must be a multiple of key_heads, not 3 and 2"):
        DeltaNetSpec(key_heads=2, value_heads=3, key_dim=8, value_dim=8)


def test_tensor_parallelism_is_refused_by_name():
    plan = make_plan(read_model("Qwen3.5-27B"), Training(seq_len=64, weights=BF16), mesh=Mesh(tp=2))
    with pytest.raises(UnsupportedError, match="tensor_parallel"):
        apply(plan, [TensorParallel()])
