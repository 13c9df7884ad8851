"""Adam-mini, GaLore and APOLLO: their states, their refusals, and cases of other families than the sample's.

Recorded with adam-mini 1.1.1, galore-torch 1.0 and apollo-torch 1.0.3 on fake CUDA tensors (torch 2.13.0). Two things
were exchanged there, neither of which allocates on the device: APOLLO's random generators, and Adam-mini's question
whether there is a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Optimizer, Training, simulate
from simulator.lowering import lower
from simulator.plan import make_plan
from simulator.reading import spec_from_class
from simulator.roles import Role
from simulator.timeline import LiveSet, moments
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from studies.estimate import estimate
from studies.options import TrainingOptions
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.strategies import uniform_llama

ORACLE = Path(__file__).parents[1] / "data" / "oracle" / "projected.jsonl"
RENEWED_ONCE = "-gap200-"
PROJECTING = ("galore_adamw", "apollo_adamw")
#: Sides of 48 and 80, heads of 12.
SIDES = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4, "intermediate_size": 80, "vocab_size": 90}
MODEL = spec_from_class("LlamaConfig", SIDES, "model")


def run(optimizer, model=MODEL, **changes):
    return simulate(model, Training(seq_len=8, optimizer=optimizer, **changes), [])


def states(report, kept=None):
    """Elements x bytes of each optimizer state of the cold step, by the end of its label."""
    found = {}
    for moment in moments(report.program.cold):
        for storage in (reference.storage for reference in moment.step.births):
            if storage.role is Role.OPTIMIZER_STATE:
                name = storage.label.rpartition(".")[2]
                found[name] = found.get(name, 0) + int(storage.size.nbytes(report.program.bindings))
    return found if kept is None else found[kept]


def test_peaks_and_phases_of_recorded_cases():
    rows = validate_oracle(ORACLE).rows
    compared = [row for row in rows if RENEWED_ONCE not in row.name]
    assert len(compared) > 10
    assert [row.name for row in compared if row.error_pct != 0] == []
    assert all("update_proj_gap" in (row.reason or "") for row in rows if RENEWED_ONCE in row.name)


@pytest.mark.parametrize(
    "line", [line for line in read_cases(ORACLE) if RENEWED_ONCE in line["id"]], ids=lambda line: line["id"]
)
def test_a_step_that_renews_nothing_needs_less(line):
    """The first step renews in any case; the second of these recordings did not."""
    line["case"]["optimizer"]["update_proj_gap"] = 1
    report = simulate(*oracle_case(line))
    assert report.cold.nbytes == line["first_iteration"]["peak_r512"]
    assert report.steady.nbytes > line["steady"]["peak_r512"]


@settings(max_examples=20)
@given(st.sampled_from(PROJECTING), st.integers(1, 48), st.sampled_from([FP32, BF16]))
def test_moments_have_the_rank_for_their_shorter_side(name, rank, weights):
    """Four matrices of 48 x 48 and three of 48 x 80 a layer; the rest has moments of its own size."""
    report = run(Optimizer(name=name, rank=rank), weights=weights)
    whole = 2 * 90 * 48 + (2 * 4 + 1) * 48
    projected = 4 * (4 * 48 + 3 * 80) * rank
    assert states(report, "exp_avg") == states(report, "exp_avg_sq") == (whole + projected) * weights.bits // 8


@pytest.mark.parametrize("rank", [1, 7])
def test_galore_keeps_all_singular_vectors_of_fp32_gradients(rank):
    """A slice of the decomposition is a view of all of it; 16-bit gradients leave a copy of what is used."""
    full, half = (run(Optimizer(name="galore_adamw", rank=rank), weights=w) for w in (FP32, BF16))
    assert states(full, "ortho_matrix") == 4 * 7 * 48 * 48 * 4
    assert states(half, "ortho_matrix") == 4 * 7 * 48 * rank * 2


def test_more_ranks_than_the_matrix_has():
    """There are no more singular vectors than rows, but as many random ones as one likes."""
    galore, apollo = (run(Optimizer(name=name, rank=100), weights=BF16) for name in PROJECTING)
    assert states(galore, "ortho_matrix") == 4 * 7 * 48 * 48 * 2
    assert states(apollo, "ortho_matrix") == 4 * 7 * 48 * 100 * 2


def test_a_step_size_per_tensor_needs_no_more():
    channel, tensor = (run(Optimizer(name="apollo_adamw", rank=1, scale_type=kind)) for kind in ("channel", "tensor"))
    assert tensor.steady.nbytes <= channel.steady.nbytes
    assert tensor.steady.start_bytes == channel.steady.start_bytes


def test_the_decomposition_works_on_a_copy_inside_its_kernel():
    seen, hidden = (run(Optimizer(name="galore_adamw"), kernel_workspace=flag) for flag in (False, True))
    births = [r.storage for m in moments(hidden.program.cold) for r in m.step.births if "svd" in m.step.name]
    assert {storage.role for storage in births} >= {Role.WORKSPACE}
    assert hidden.peak.nbytes >= seen.peak.nbytes


@pytest.mark.parametrize("name", PROJECTING)
@pytest.mark.parametrize("layers", [1, 2, 3, 7])
def test_a_model_whose_last_weight_is_in_a_layer(name, layers):
    """They go from the last layer's norms back to the first layer's matrices."""
    config = {"hidden_size": 48, "num_attention_heads": 4, "ffn_dim": 80, "vocab_size": 90, "word_embed_proj_dim": 48}
    model = spec_from_class("OPTConfig", config | {"num_hidden_layers": layers, "do_layer_norm_before": False}, "model")
    training = Training(seq_len=8, optimizer=Optimizer(name=name, rank=3))
    short, long = (lower(make_plan(model, training, unrolled=flag)) for flag in (False, True))
    live = LiveSet()
    for node in (short.load, short.cold, short.steady):
        for moment in moments(node):
            live.run(moment)
    traces = [[len(m.step.births) for m in moments(p.steady) if m.step.births] for p in (short, long)]
    assert traces[0] == traces[1]


def test_adam_mini_has_a_second_moment_per_head_row_or_tensor():
    report = run(Optimizer(name="adam_mini"))
    heads, rows, tensors = 4 * 2 * 4, 4 * (48 + 48 + 80 + 80 + 48) + 2 * 90, 4 * 2 + 1
    assert states(report, "vmean") == 4 * (heads + rows + tensors)
    assert states(report, "m") == 4 * sum(
        storage.size.nbytes(report.program.bindings) // 4
        for m in moments(report.program.load)
        for storage in (r.storage for r in m.step.births)
        if storage.role is Role.PARAMETER
    )


@pytest.mark.parametrize(
    ("family", "config", "hint"),
    [
        ("OPTConfig", {"num_hidden_layers": 1}, "final_layer_norm.weight for a matrix, but it has 1 axes"),
        ("MixtralConfig", {"num_hidden_layers": 1}, "gate_up_proj for a matrix, but it has 3 axes"),
        ("GemmaConfig", SIDES | {"head_dim": 10, "num_key_value_heads": 4}, "into heads of 576 numbers"),
    ],
)
def test_adam_mini_is_refused_where_its_own_code_fails(family, config, hint):
    with pytest.raises(UnsupportedError, match=hint):
        run(Optimizer(name="adam_mini"), spec_from_class(family, config, "model"))


def test_several_gpus():
    training = {"dtype": "bf16", "strategy": ("ddp",), "seq_len": 8}
    with pytest.raises(UnsupportedError, match="adam_mini on several GPUs"):
        estimate(uniform_llama(layers=2), "2x24GiB", TrainingOptions(optimizer="adam_mini", **training))
    estimate(uniform_llama(layers=2), "2x24GiB", TrainingOptions(optimizer="galore_adamw,rank=2", **training))


@pytest.mark.parametrize("name", [*PROJECTING, "adam_mini"])
def test_whole_weights_are_needed(name):
    with pytest.raises(UnsupportedError, match=name):
        simulate(MODEL, Training(seq_len=8, optimizer=Optimizer(name=name)), [Fsdp2()])
    if name in PROJECTING:
        simulate(MODEL, Training(seq_len=8, optimizer=Optimizer(name=name)), [Ddp()])


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"name": "adamw", "rank": 8}, "'rank' belongs to galore_adamw, apollo_adamw, not to adamw"),
        ({"name": "galore_adamw", "rank": 0}, "'rank' must be a whole number"),
        ({"name": "galore_adamw", "rank": 2.5}, "'rank' must be a whole number"),
        ({"name": "galore_adamw", "scale_type": "tensor"}, "'scale_type' belongs to apollo_adamw"),
        ({"name": "apollo_adamw", "scale_type": "row"}, "scale_type"),
    ],
    ids=str,
)
def test_refusals_are_one_clear_line(options, hint):
    with pytest.raises(UsageError, match=hint):
        Optimizer(**options)
