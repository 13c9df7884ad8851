"""Gemini: the chunk search against its plain form, chunks and totals over ranks, LLMem's sums."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP16
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.plan import apply, make_plan
from simulator.reading import spec_from_class
from simulator.report import count_parameters
from simulator.roles import Phase, Role
from simulator.timeline import LiveSet, moments
from simulator.workload import Optimizer
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.gemini import MEGA, Gemini, fill, search
from tests.strategies import model_specs, uniform_llama
from tests.strategy.residents import persistent

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "gemini.jsonl"
#: Chunks of a few thousand elements, so that small models have several.
SMALL = {"min_chunk_size_m": 4096 / MEGA, "search_range_m": 4096 / MEGA}


class TestGemini(StrategyContract):
    strategy = Gemini(**SMALL)
    mesh = Mesh(dp_shard=4)
    axis = "dp_shard"


class TestGeminiWhole(StrategyContract):
    strategy = Gemini(precision=BF16)
    mesh = Mesh(dp_shard=2)


class TestGeminiCuda(StrategyContract):
    strategy = Gemini(**SMALL, placement_policy="cuda", keep_gathered_alone=True)


def recorded():
    """Runs of Gemini's own code, around transformers' Llama in bf16 with eager attention, on tensors of the CPU."""
    return [json.loads(line) for line in RECORDED.read_text().splitlines()]


@pytest.mark.parametrize("line", recorded(), ids=lambda line: "-".join(map(str, line["config"].values())))
def test_recorded_peaks_are_met_to_the_byte(line):
    """Cold and steady peaks and the phase of the steady one; kernels' own temporaries cannot be recorded."""
    config = line["config"]
    layers = {"num_hidden_layers": config["layers"], "num_attention_heads": 8, "num_key_value_heads": 4}
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024, "tie_word_embeddings": False}
    workload = {"micro_batch": config["batch"], "seq_len": config["seq"], "attention": "eager"}
    options = {k: config[k] for k in ("min_chunk_size_m", "search_range_m", "shard_param_frac") if k in config}
    report = simulate(
        spec_from_class("LlamaConfig", {**layers, **sizes}, "tiny"),
        Training(**workload, keep_inputs=True, kernel_workspace=False),
        [*([FullCheckpointing()] if config.get("ac") else []), Gemini(precision=BF16, **options)],
        mesh=Mesh(dp_shard=config["world"]),
        rank=config.get("rank", 0),
    )
    assert report.cold.nbytes == line["first_step_peak_bytes"]
    assert report.steady.nbytes == line["peak_bytes"]
    assert report.steady.phase.value == line["phase"]


def plain_search(sizes, ranks, smallest, reach, interval):
    """search_utils.py `search_chunk_configuration` without arrays."""
    mean = sum(sizes) / len(sizes)
    deviation = (sum((size - mean) ** 2 for size in sizes) / len(sizes)) ** 0.5
    usual = [size for size in sizes if size <= mean + 3 * deviation]
    start = -(-max(smallest, *usual) // interval) * interval

    def waste(chunk_size):
        wasted = left = 0
        for size in usual:
            if size > left:
                wasted, left = wasted + left, chunk_size
            left -= size
        return wasted + left

    best = min(range(start, start + reach + 1, interval), key=waste)
    return best + -best % ranks


@given(
    sizes=st.lists(st.integers(1, 30000), min_size=1, max_size=40),
    ranks=st.integers(1, 9),
    interval=st.sampled_from((64, 1000, 1024)),
)
def test_the_search_is_that_of_the_framework(sizes, ranks, interval):
    size, whole = search(sizes, ranks, Gemini(**SMALL), interval)
    assert whole == (sum(sizes) < 4096)
    assert size == (sum(sizes) if whole else plain_search(sizes, ranks, 4096, 4096, interval))


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=40), ranks=st.integers(1, 4))
def test_chunks_hold_every_weight_in_order_and_are_full(sizes, ranks):
    """No weight is split; a chunk ends only where the next weight would not fit."""
    chunk_size = 1200 * ranks
    chunks = fill([(None, None, size) for size in sizes], chunk_size, ranks)
    assert [member.end - member.start for chunk in chunks for member in chunk] == sizes
    for chunk, following in pairwise(chunks):
        assert chunk[-1].end + following[0].end > chunk_size


@settings(max_examples=10)
@given(model=model_specs(max_layers=3), ranks=st.integers(1, 4))
def test_ranks_together_update_every_weight_once(model, ranks):
    """Moments of all ranks are those of the whole model; every 16-bit chunk has a friend in fp32."""
    training = Training(micro_batch=1, seq_len=8, attention="eager")
    moments_held = 0
    for rank in range(ranks):
        plan = make_plan(model, training, mesh=Mesh(dp_shard=ranks), rank=rank)
        held = persistent(apply(plan, [Gemini(**SMALL)]))
        assert held[Role.MASTER_WEIGHT] == 2 * held[Role.PARAMETER]
        moments_held += held[Role.OPTIMIZER_STATE]
    weights = count_parameters(make_plan(model, training))
    whole = weights < 4096  # kept gathered on every rank
    assert moments_held == 8 * weights * (ranks if whole else 1)


def end_of_forward(report):
    """Exact bytes by role when the steady step's forward has ended."""
    program, live = report.program, LiveSet()
    for node in (program.load, program.cold):
        for moment in moments(node):
            live.run(moment)
    for moment in moments(program.steady):
        if moment.step.phase is Phase.BACKWARD:
            break
        live.run(moment)
    found = dict.fromkeys(Role, 0)
    for alive in live.storages(program.bindings):
        found[alive.storage.role] += alive.storage.size.nbytes(program.bindings)
    return found


def test_llmem_has_the_whole_model_gathered_at_the_end_of_forward():
    """ADP: m_p16 + (m_p32 + m_os) / n, with chunks for weights (LLMem, section 3)."""
    ranks, model, training = 4, uniform_llama(6), Training(micro_batch=1, seq_len=16)
    strategies = [FullCheckpointing(), Gemini(**SMALL, placement_policy="cuda")]
    held = end_of_forward(simulate(model, training, strategies, mesh=Mesh(dp_shard=ranks)))
    released = end_of_forward(simulate(model, training, [Gemini(**SMALL)], mesh=Mesh(dp_shard=ranks)))
    assert held[Role.PARAMETER] == 0
    assert held[Role.GATHERED] == held[Role.MASTER_WEIGHT] * ranks // 2
    assert released[Role.GATHERED] < held[Role.GATHERED] / 2


def test_one_rank_alone_keeps_chunks_whole_with_llmems_patch():
    """Gathering and scattering alone cost a chunk twice for a moment; kept whole they do not."""
    model, training = uniform_llama(6), Training(micro_batch=1, seq_len=16)
    plain, patched = (
        simulate(model, training, [Gemini(**SMALL, keep_gathered_alone=alone)]) for alone in (False, True)
    )
    assert patched.steady.end_bytes == plain.steady.end_bytes
    assert patched.peak.nbytes <= plain.peak.nbytes
    assert Role.GATHERED not in patched.steady.by_role


@pytest.mark.parametrize(
    ("training", "hint"),
    [
        (Training(gradient_accumulation=2), "gradient_accumulation"),
        (Training(optimizer=Optimizer(name="sgd")), "sgd"),
    ],
)
def test_what_is_not_modelled_is_refused_in_one_line(training, hint):
    with pytest.raises((UsageError, UnsupportedError), match=hint) as caught:
        apply(make_plan(uniform_llama(2), training), [Gemini()])
    assert "\n" not in str(caught.value)


def test_wrong_options_are_refused():
    for wrong in ({"precision": "fp32"}, {"shard_param_frac": 1.5}, {"placement_policy": "auto"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Gemini(**wrong)
    assert Gemini().precision == FP16
