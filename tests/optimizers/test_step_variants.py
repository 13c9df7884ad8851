"""The scaler and the optimizer in backward change what a step consists of: the laws of programs hold all the same."""

from __future__ import annotations

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.dtypes import FP16, FP32
from hardware.errors import UnsupportedError
from simulator.lowering import lower
from simulator.plan import apply, make_plan
from simulator.report import Report
from simulator.roles import Role
from simulator.timeline import LiveSet, moments
from strategies.checkpointing import FullCheckpointing
from strategies.ddp import Ddp
from tests.strategies import model_specs, trainings

some = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
PERSISTENT = {Role.PARAMETER, Role.BUFFER, Role.OPTIMIZER_STATE, Role.BUCKET}


@st.composite
def variants(draw):
    """Trainings with a scaler or with the optimizer in backward, and strategies that go with them."""
    training = draw(trainings())
    checkpointing = draw(st.sampled_from([(), (FullCheckpointing(),)]))
    if training.optimizer.name != "muon" and draw(st.booleans()):
        data_parallel = draw(st.sampled_from([(), (Ddp(),)]))
        return attrs.evolve(training, weights=FP32, autocast=FP16, grad_scaler=True), checkpointing + data_parallel
    alone = {"gradient_accumulation": 1, "clip": None, "zero_grad": "none"}
    return attrs.evolve(training, **alone, optimizer_in_backward=True), checkpointing


def report_of(model, variant, *, unrolled=False):
    training, strategies = variant
    try:
        plan = apply(make_plan(model, training, unrolled=unrolled), strategies)
        return Report(plan, lower(plan))
    except UnsupportedError:
        return None


@some
@given(model_specs(), variants())
def test_fold_is_unroll(model, variant):
    """Peaks of the folded program are those of all its steps; each storage is born and freed once, and none leaks."""
    report = report_of(model, variant)
    if report is None:
        return
    live, bindings = LiveSet(), report.program.bindings
    for moment in moments(report.program.load):
        live.run(moment)
    for step, node in ((report.cold, report.program.cold), (report.steady, report.program.steady)):
        now, highest = step.start_bytes, step.start_bytes
        for moment in moments(node):
            live.run(moment)
            now += sum(int(r.storage.size.allocated(bindings)) for r in moment.step.births)
            highest = max(highest, now)
            now -= sum(int(r.storage.size.allocated(bindings)) for r in moment.step.deaths)
        assert (highest, now) == (step.nbytes, step.end_bytes)
    assert report.steady.start_bytes == report.steady.end_bytes
    allowed = PERSISTENT | ({Role.GRADIENT} if report.training.zero_grad == "zero" else set())
    assert {storage.storage.role for storage in live.storages(bindings)} <= allowed


@some
@given(model_specs(), variants())
def test_repeats_stand_for_every_layer(model, variant):
    short, long = (report_of(model, variant, unrolled=flag) for flag in (False, True))
    if short is None:
        return
    for one, other in ((short.cold, long.cold), (short.steady, long.steady)):
        assert one.nbytes == other.nbytes
        assert one.by_role == other.by_role
        assert (one.start_bytes, one.end_bytes) == (other.start_bytes, other.end_bytes)
