"""What every optimizer keeps, whatever the model: bytes of states, bounds of temporaries, refusals in one line."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Optimizer, Training, simulate
from simulator.reading import spec_from_class
from simulator.roles import Phase, Role
from simulator.timeline import moments
from simulator.workload import IMPLEMENTATIONS
from strategies.ddp import Ddp

WAYS = [(name, way) for name, ways in IMPLEMENTATIONS.items() for way in ways]
#: States as big as the weight, per parameter.
MOMENTS = {"adam": 2, "adamw": 2, "sgd": 0}


@st.composite
def models(draw):
    heads = draw(st.sampled_from([1, 2, 4]))
    config = {
        "hidden_size": heads * draw(st.sampled_from([16, 24])),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 7)),
        "intermediate_size": draw(st.integers(8, 200)),
        "vocab_size": draw(st.integers(8, 500)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return spec_from_class("LlamaConfig", config, "model")


def run(model, **changes):
    return simulate(model, Training(micro_batch=1, seq_len=8, **changes), [])


def optimizer_bytes(report, node, role):
    """Live bytes of `role` after each allocation of the optimizer phase of `node`."""
    live, found = 0, [0]
    for moment in moments(node):
        if moment.step.phase is not Phase.OPTIMIZER:
            continue
        price = report.program.bindings
        live += sum(int(r.storage.size.allocated(price)) for r in moment.step.births if r.storage.role is role)
        found.append(live)
        live -= sum(int(r.storage.size.allocated(price)) for r in moment.step.deaths if r.storage.role is role)
    return found, live


def parameters(report):
    """Allocated bytes of each parameter."""
    born = [r.storage for m in moments(report.program.load) for r in m.step.births]
    return [int(s.size.allocated(report.program.bindings)) for s in born if s.role is Role.PARAMETER]


@settings(max_examples=25)
@given(models(), st.sampled_from(["adam", "adamw", "sgd"]), st.sampled_from([FP32, BF16]), st.booleans())
def test_states_are_whole_multiples_of_the_weights(model, name, weights, amsgrad):
    for way in IMPLEMENTATIONS[name]:
        optimizer = Optimizer(name=name, implementation=way, amsgrad=amsgrad and name != "sgd")
        report = run(model, optimizer=optimizer, weights=weights)
        _, kept = optimizer_bytes(report, report.program.cold, Role.OPTIMIZER_STATE)
        steps = 512 * len(parameters(report)) if way == "fused" and name != "sgd" else 0
        assert kept == (MOMENTS[name] + optimizer.amsgrad) * sum(parameters(report)) + steps


@settings(max_examples=25)
@given(models(), st.floats(0.1, 1), st.booleans())
def test_a_momentum_buffer_is_one_more_copy(model, momentum, nesterov):
    for way in IMPLEMENTATIONS["sgd"]:
        optimizer = Optimizer(name="sgd", implementation=way, momentum=momentum, nesterov=nesterov)
        report = run(model, optimizer=optimizer)
        assert optimizer_bytes(report, report.program.cold, Role.OPTIMIZER_STATE)[1] == sum(parameters(report))


@settings(max_examples=25)
@given(models(), st.sampled_from(WAYS), st.sampled_from([None, 1.0]), st.sampled_from(["none", "zero"]))
def test_temporaries_go_and_states_stay(model, way, clip, zero_grad):
    """After a step no temporary is left, and a steady step makes no state."""
    report = run(model, optimizer=Optimizer(name=way[0], implementation=way[1]), clip=clip, zero_grad=zero_grad)
    for node in (report.program.cold, report.program.steady):
        assert optimizer_bytes(report, node, Role.OPTIMIZER)[1] == 0
    assert optimizer_bytes(report, report.program.steady, Role.OPTIMIZER_STATE)[0][-1] == 0


@settings(max_examples=25)
@given(models(), st.sampled_from(["adam", "adamw", "sgd"]), st.sampled_from([0.0, 0.1]), st.booleans())
def test_fused_never_needs_more_temporaries(model, name, weight_decay, amsgrad):
    options = {"name": name, "weight_decay": weight_decay, "amsgrad": amsgrad and name != "sgd"}
    most = {}
    for way in IMPLEMENTATIONS[name]:
        report = run(model, optimizer=Optimizer(implementation=way, **options))
        most[way] = max(optimizer_bytes(report, report.program.steady, Role.OPTIMIZER)[0])
    assert most["fused"] == 0 <= most["foreach"]
    assert most["for-loop"] <= most["foreach"] + 2 * max(parameters(report))


#: Tensors as big as a parameter that a for-loop may hold at once: of this parameter and, in a local, the last one's.
AT_ONCE = {"adam": 4, "adamw": 3, "sgd": 2, "adafactor": 3, "adafactor_hf": 3}


@settings(max_examples=40)
@given(models(), st.sampled_from(sorted(AT_ONCE)), st.sampled_from([0.0, 0.1]))
def test_for_loop_temporaries_do_not_grow_with_depth(model, name, weight_decay):
    optimizer = Optimizer(name=name, implementation="for-loop", weight_decay=weight_decay)
    report = run(model, optimizer=optimizer)
    most = max(optimizer_bytes(report, report.program.steady, Role.OPTIMIZER)[0])
    rows_and_columns = 8 * max(parameters(report)) if name.startswith("adafactor") else 0
    small = 8 * 512 + min(rows_and_columns, 8 * 4 * 512)
    assert most <= AT_ONCE[name] * max(parameters(report)) + small


@settings(max_examples=25)
@given(models(), st.sampled_from([FP32, BF16]))
def test_clipping_stacks_one_norm_per_parameter(model, weights):
    """Its most: a granule per norm, the stack of all of them, and the total."""
    report = run(model, weights=weights, clip=1.0, optimizer=Optimizer(name="sgd"))
    count = len(parameters(report))
    stacked = -(-count * weights.bits // 8 // 512) * 512
    assert max(optimizer_bytes(report, report.program.steady, Role.OPTIMIZER)[0]) == (count + 1) * 512 + stacked


WRONG = [
    ({"name": "adamW"}, "adamw"),
    ({"name": "lamb"}, "optimizer"),
    ({"name": ["adam"]}, "optimizer"),
    ({"name": "adafactor_hf", "implementation": "foreach"}, "for-loop"),
    ({"name": "adafactor", "implementation": "fused"}, "implementation of adafactor"),
    ({"implementation": "fuse"}, "fused"),
    ({"implementation": None}, "implementation"),
    ({"name": "sgd", "momentum": -0.1}, "momentum"),
    ({"name": "sgd", "momentum": True}, "momentum"),
    ({"weight_decay": float("nan")}, "weight_decay"),
    ({"weight_decay": "0.1"}, "weight_decay"),
    ({"name": "sgd", "nesterov": True}, "momentum"),
    ({"name": "adam", "momentum": 0.9}, "sgd"),
    ({"name": "sgd", "amsgrad": True}, "amsgrad"),
    ({"amsgrad": "yes"}, "amsgrad"),
    ({"name": "adamw", "centered": True}, "rmsprop"),
    ({"name": "lion", "maximize": True}, "maximize"),
]


@pytest.mark.parametrize(("options", "hint"), WRONG, ids=str)
def test_refusals_are_one_clear_line(options, hint):
    with pytest.raises(UsageError) as error:
        Optimizer(**options)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


def test_a_change_is_validated_too():
    with pytest.raises(UsageError):
        attrs.evolve(Optimizer(), implementation="slow")


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"gradient_accumulation": 2}, "accumulate"), ({"clip": 1.0}, "norm"), ({"zero_grad": "zero"}, "zero_grad")],
    ids=str,
)
def test_in_backward_refuses_what_needs_all_gradients(options, hint):
    with pytest.raises(UsageError, match=hint):
        Training(optimizer_in_backward=True, **options)


def test_in_backward_refuses_what_runs_its_own_loop():
    with pytest.raises(UnsupportedError, match="optimizer_in_backward"):
        Training(optimizer_in_backward=True, implementation="megatron_te")
    model = spec_from_class("LlamaConfig", {"num_hidden_layers": 2}, "model")
    with pytest.raises(UnsupportedError, match="with a strategy"):
        simulate(model, Training(seq_len=8, optimizer_in_backward=True), [Ddp()])


@settings(max_examples=25)
@given(models(), st.sampled_from(WAYS))
def test_in_backward_keeps_the_same_states_and_no_gradient(model, way):
    """Between steps the same is left, save the quantization maps that each 8-bit optimizer has for itself."""
    optimizer = Optimizer(name=way[0], implementation=way[1])
    after, within = (run(model, optimizer=optimizer, optimizer_in_backward=each) for each in (False, True))
    extra = within.steady.start_bytes - after.steady.start_bytes
    assert extra >= 0 if way[0] in ("adamw_8bit", "adamw_8bit_paged", "lion_8bit") else extra == 0
