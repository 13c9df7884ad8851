"""Properties of every model and workload: folding, unrolling and the naive interpreter agree; nothing leaks."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.errors import UnsupportedError
from simulator import Training, simulate
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.report import Report
from simulator.roles import Role
from simulator.timeline import LiveSet, moments
from strategies.checkpointing import FullCheckpointing
from tests.simulator.naive import NaiveMicroBatches
from tests.strategies import model_specs, trainings

PERSISTENT = {Role.PARAMETER, Role.BUFFER, Role.OPTIMIZER_STATE}
some = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
choices = st.sampled_from([(), (FullCheckpointing(),)])


def report_of(model, training, strategies, *, unrolled=False):
    """A report, with every layer built when `unrolled`; unsupported combinations are not this file's business."""
    try:
        plan = apply(make_plan(model, training, unrolled=unrolled), strategies)
        return Report(plan, lower(plan))
    except UnsupportedError:
        return None


def allocating(node, bindings, live):
    """Live bytes after every allocating step of `node`, which starts with `live` bytes."""
    trace = []
    for moment in moments(node):
        births = sum(int(r.storage.size.allocated(bindings)) for r in moment.step.births)
        live += births
        if births:
            trace.append(live)
        live -= sum(int(r.storage.size.allocated(bindings)) for r in moment.step.deaths)
    return trace, live


@some
@given(model_specs(), trainings(), choices)
def test_fold_is_unroll(model, training, strategies):
    """The folded peaks are the highest points of the unrolled program, and so are the bytes left."""
    report = report_of(model, training, strategies)
    if report is None:
        return
    bindings = report.program.bindings
    live = allocating(report.program.load, bindings, 0)[1]
    for step, node in ((report.cold, report.program.cold), (report.steady, report.program.steady)):
        assert step.start_bytes == live
        trace, live = allocating(node, bindings, live)
        assert max(trace) == step.nbytes
        assert step.end_bytes == live


@some
@given(model_specs(), trainings(), choices)
def test_repeats_stand_for_every_layer(model, training, strategies):
    """Building at most three turns of a pattern gives the peaks of building every layer."""
    short, long = (report_of(model, training, strategies, unrolled=flag) for flag in (False, True))
    if short is None:
        assert long is None
        return
    for one, other in ((short.cold, long.cold), (short.steady, long.steady)):
        assert one.nbytes == other.nbytes
        assert one.by_role == other.by_role
        assert (one.start_bytes, one.end_bytes) == (other.start_bytes, other.end_bytes)
    assert short.parameters == long.parameters


def made_by_constructors(program):
    """Bytes of optimizer states that exist before the first step (Adagrad's): the interpreter runs no optimizer."""
    births = [r.storage for moment in moments(program.load) for r in moment.step.births]
    return sum(int(s.size.allocated(program.bindings)) for s in births if s.role is Role.OPTIMIZER_STATE)


@some
@given(model_specs(max_layers=5), trainings())
def test_naive_interpreter_agrees(model, training):
    """Python's own reference counts see the same live bytes at every op of every micro-batch."""
    try:
        naive = NaiveMicroBatches(make_plan(model, training, unrolled=True))
        program = lower(make_plan(model, training))
    except UnsupportedError:
        return
    expected = [naive.run() for _ in range(training.gradient_accumulation)]
    found, live = [], allocating(program.load, program.bindings, 0)[1] - made_by_constructors(program)
    for moment in moments(program.cold):
        if moment.step.phase.value == "optimizer":
            break
        births = sum(int(r.storage.size.allocated(program.bindings)) for r in moment.step.births)
        live += births
        found += [live] if moment.step.births else []  # also of nothing: an empty slice is a tensor, too
        live -= sum(int(r.storage.size.allocated(program.bindings)) for r in moment.step.deaths)
    assert found == [value for trace in expected for value in trace]


@some
@given(model_specs(), trainings(), choices)
def test_a_steady_step_leaks_nothing(model, training, strategies):
    """After each step only weights, buffers and optimizer state are left (and gradients that are set to zero)."""
    report = report_of(model, training, strategies)
    if report is None:
        return
    assert report.steady.start_bytes == report.steady.end_bytes
    live = LiveSet()
    for node in (report.program.load, report.program.cold, report.program.steady):
        for moment in moments(node):
            live.run(moment)
    allowed = PERSISTENT | ({Role.GRADIENT} if training.zero_grad == "zero" else set())
    assert {storage.storage.role for storage in live.storages(report.program.bindings)} <= allowed


@some
@given(model_specs(), trainings(), choices)
def test_live_set_is_the_peak(model, training, strategies):
    """The storages alive at the peak add up to it, by role too."""
    report = report_of(model, training, strategies)
    if report is None:
        return
    for step in (report.cold, report.steady):
        live = report.live(step)
        assert sum(storage.nbytes for storage in live) == step.nbytes
        for role, nbytes in step.by_role.items():
            assert sum(s.nbytes for s in live if s.storage.role is role) == nbytes


@some
@given(model_specs(), trainings(), choices, st.sampled_from(["micro_batch", "seq_len"]))
def test_more_tokens_never_need_less(model, training, strategies, field):
    """The peak is monotone in batch and sequence (where the attention kernel stays the same)."""
    more = attrs.evolve(training, **{field: 2 * getattr(training, field)})
    small, large = report_of(model, training, strategies), report_of(model, more, strategies)
    if small is not None and large is not None:
        assert large.peak.nbytes >= small.peak.nbytes


@some
@given(model_specs(), trainings())
def test_checkpointing_never_saves_more(model, training):
    """Recomputation may move the peak but what is alive after forward never grows."""
    plain, checkpointed = report_of(model, training, ()), report_of(model, training, (FullCheckpointing(),))
    if plain is None or checkpointed is None:
        return
    assert plain.parameters == checkpointed.parameters
    assert plain.steady.start_bytes == checkpointed.steady.start_bytes


def test_a_million_events_unroll():
    """400 layers and some micro-batches: about a million events, each storage born and dead once."""
    from tests.strategies import uniform_llama

    report = simulate(uniform_llama(layers=400), attrs.evolve(trainings_example(), gradient_accumulation=6))
    live, events = LiveSet(), 0
    for node in (report.program.load, report.program.cold, report.program.steady):
        for moment in moments(node):
            live.run(moment)
            events += len(moment.step.births) + len(moment.step.deaths)
    assert events > 900_000
    assert {s.storage.role for s in live.storages(report.program.bindings)} <= PERSISTENT


def trainings_example():
    return Training(micro_batch=1, seq_len=16)


@pytest.mark.parametrize("why", ["reads", "saves", "holds"])
def test_liveness_comes_from_the_edges(why):
    """Remove edges of one kind and lifetimes change: nothing else keeps a storage alive."""
    from tests.strategies import uniform_llama

    model = uniform_llama(layers=2)
    plan = make_plan(model, trainings_example())
    before = allocating(lower(plan).cold, plan.dimensions.bindings, 0)[0]
    changed = 0
    for _, _, edge in plan.graph.edges.edges(data=True):
        changed += edge.pop(why, None) is not None
    assert changed
    after = allocating(lower(plan).cold, plan.dimensions.bindings, 0)[0]
    assert before != after


@pytest.mark.parametrize("exponent", range(8, 21, 2))
def test_byte_counts_beyond_64_bits_do_not_wrap_around(exponent):
    """Four times the batch never needs less, also where products of counts and bytes leave 64 bits."""
    peaks = [
        simulate("llama-3.1-405b", Training(micro_batch=batch, seq_len=2**20, attention="eager")).peak.nbytes
        for batch in (2 ** (exponent - 2), 2**exponent)
    ]
    assert 3.9 * peaks[0] < peaks[1] <= 4 * peaks[0]
