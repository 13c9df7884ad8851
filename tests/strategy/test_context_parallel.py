"""Sequences sharded over ranks: recorded allocations of Transformer Engine's own code, and what ranks hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32, TRAINING_DTYPES
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.families import Family, families
from simulator.lowering import lower
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.plan import apply, make_plan, rank_classes
from simulator.reading import spec_from_class
from simulator.roles import Phase, Role
from simulator.timeline import moments
from strategies.checkpointing import FullCheckpointing
from strategies.context_parallel import ContextParallel
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from strategies.megatron import MegatronDistributedOptimizer
from strategies.tensor_parallel import TensorParallel
from studies.parallelism import Degrees, parallelise

CONFIG = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 208}
CONFIG |= {"num_hidden_layers": 3, "vocab_size": 1024, "max_position_embeddings": 256}
LLAMA = spec_from_class("LlamaConfig", CONFIG, "tiny")

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "context_parallel.jsonl"
CASES = [json.loads(line) for line in RECORDED.read_text().splitlines()]
TRAINED = [json.loads(line) for line in RECORDED.with_stem("context_parallel_llama").read_text().splitlines()]
FAMILY = "sharded_attention"
RECIPE = dict.fromkeys(("megatron_te", "transformers"), "tests.strategy.sharded_attention")


def phase_peaks(program, step):
    """The highest total of forward and of backward of a step, each counted from the weights on."""
    live, peaks = 0, {}
    for node in (program.load, step):
        for moment in moments(node):
            live += sum(each.storage.size.allocated(program.bindings) for each in moment.step.births)
            peaks[moment.step.phase] = max(peaks.get(moment.step.phase, 0), live)
            live -= sum(each.storage.size.allocated(program.bindings) for each in moment.step.deaths)
    return peaks


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_recorded_allocations_of_attention(case, monkeypatch):
    """Transformer Engine's functions, and torch's under ``context_parallel``; each rank has allocations of its own."""
    config = case["config"]
    recorded = Family(FAMILY, read=lambda reader: None, implementations=RECIPE)
    monkeypatch.setattr(families, "_items", {**families._items, FAMILY: recorded})
    monkeypatch.setattr("strategies.context_parallel.FAMILIES", (FAMILY,))
    attention = AttentionSpec(config["heads"], config["kv_heads"], config["head_dim"])
    model = ModelSpec("recorded", FAMILY, 8, 8, 4096, (LayerSpec(attention, FeedForwardSpec(8)),))
    training = Training(
        micro_batch=config["batch"],
        seq_len=config["seq"],
        weights=BF16,
        implementation="transformers" if config.get("framework") == "torch" else "megatron_te",
        kernel_workspace=False,
    )
    plan = make_plan(model, training, mesh=Mesh(cp=config["cp"]), rank=config["rank"])
    program = lower(apply(plan, [ContextParallel(communication=config["comm"])]))
    peaks = phase_peaks(program, program.cold)
    assert peaks[Phase.FORWARD] == case["forward_peak_bytes"]
    assert peaks[Phase.BACKWARD] == case["backward_peak_bytes"]


class Sixteen:
    """Kernels of both implementations take 16 bits alone."""

    implementation: str
    mesh = Mesh(cp=2)
    axis = "cp"

    def plans(self, mesh=None, *, unrolled=False):
        for plan in super().plans(mesh, unrolled=unrolled):
            if plan.training.weights == BF16 and plan.training.zero_grad == "none":
                yield attrs.evolve(plan, training=attrs.evolve(plan.training, implementation=self.implementation))


class TestTorch(Sixteen, StrategyContract):
    strategy = ContextParallel()
    implementation = "transformers"


class TestMegatron(Sixteen, StrategyContract):
    strategy = ContextParallel(communication="all_gather")
    implementation = "megatron_te"


def test_the_command_line_adds_the_strategy_and_its_option():
    mesh, chosen, assumed = parallelise(["fsdp2"], Degrees(cp=2, cp_comm="a2a"), 8)
    assert mesh == Mesh(dp_shard=4, cp=2)
    assert chosen[0] == ContextParallel(communication="a2a")
    assert assumed[0] == "options of --strategy context_parallel: communication=a2a"
    named = parallelise(["context_parallel,communication=a2a", "fsdp2"], Degrees(cp=2), 8)[1]
    assert named[0] == chosen[0]


@pytest.mark.parametrize(
    ("texts", "degrees", "words"),
    [
        (["fsdp2"], Degrees(cp=3), "'cp' must divide the 8 GPUs: 3; the nearest that work: 2, 4"),
        ([], Degrees(cp=8), "how the gradients of 8 ranks along cp are summed"),
        (["fsdp2"], Degrees(cp_comm="a2a"), "'cp-comm' a2a has nothing to do; give --cp 2 or more"),
        (["context_parallel", "fsdp2"], Degrees(cp=2, cp_comm="a2a"), "write communication=... in --strategy"),
    ],
)
def test_wrong_degrees_are_refused(texts, degrees, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        parallelise(texts, degrees, 8)


def ranks(comm="p2p", cp=2, tp=1, rank=0, accumulation=1, seq=64, sequence=False, **options):
    parallel = [TensorParallel(sequence_parallel=sequence)] if tp > 1 else []
    strategies = [ContextParallel(communication=comm), *parallel, MegatronDistributedOptimizer()]
    training = Training(
        **{
            "implementation": "megatron_te",
            "micro_batch": 2,
            "seq_len": seq,
            "weights": BF16,
            "gradient_accumulation": accumulation,
            **options,
        }
    )
    return simulate(LLAMA, training, strategies, mesh=Mesh(cp=cp, tp=tp), rank=rank)


@settings(max_examples=30)
@given(
    st.sampled_from(["a2a", "p2p", "all_gather"]),
    st.sampled_from([2, 4]),
    st.booleans(),
    st.integers(1, 3),
    st.data(),
)
def test_the_fold_meets_the_timeline_and_nothing_is_left(comm, cp, sequence, accumulation, data):
    tp = data.draw(st.sampled_from([1, 2] if cp == 2 else [1]))
    report = ranks(comm, cp, tp, data.draw(st.integers(0, cp - 1)), accumulation, sequence=sequence)
    assert report.steady.start_bytes == report.steady.end_bytes
    assert report.peak.nbytes == report.timeline(None).total.max()
    assert report.peak.nbytes == sum(live.nbytes for live in report.live())


@pytest.mark.parametrize("comm", ["a2a", "p2p", "all_gather"])
def test_more_ranks_hold_less_of_each_sequence(comm):
    peaks = [ranks(comm, cp, seq=1024).peak for cp in (2, 4)]
    assert peaks[1].by_role[Role.ACTIVATION] < peaks[0].by_role[Role.ACTIVATION]
    assert peaks[1].by_role[Role.OPTIMIZER_STATE] < peaks[0].by_role[Role.OPTIMIZER_STATE]


def test_the_last_rank_of_a_ring_keeps_the_most():
    """Each of its queries attends to something of every step, others have steps of half their queries."""
    plan = make_plan(LLAMA, Training(implementation="megatron_te", seq_len=64, weights=BF16), mesh=Mesh(cp=4))
    classes = rank_classes(apply(plan, [ContextParallel()]))
    assert [(each.count, each.rank) for each in classes] == [(1, 3), (1, 2), (1, 1), (1, 0)]
    assert len(rank_classes(apply(plan, [ContextParallel(communication="a2a")]))) == 1


def test_without_ranks_nothing_changes():
    plan = make_plan(LLAMA, Training(implementation="megatron_te", weights=BF16))
    assert apply(plan, [ContextParallel()]).context_parallel is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq": 66}, "'seq_len' must be a multiple of 2 x cp 2 = 4: 66; use 64 or 68"),
        ({"seq": 68, "tp": 4, "sequence": True}, "'tp' must divide the model's sequence: 34 / 4"),
        ({"comm": "a2a", "cp": 8}, "'cp' must divide the key/value heads of a rank with communication a2a: 4 / 8"),
        ({"implementation": "megatron"}, "not modelled for implementation 'megatron'; use"),
    ],
)
def test_what_cannot_be_sharded_is_refused(options, words):
    with pytest.raises(UnsupportedError, match=re.escape(words)):
        ranks(**options)


def test_an_owner_that_does_not_know_of_it_is_refused():
    training = Training(implementation="megatron_te", seq_len=64, weights=BF16)
    with pytest.raises(UnsupportedError, match="'cp' above 1 is not modelled"):
        simulate(LLAMA, training, [ContextParallel(), Ddp()], mesh=Mesh(cp=2, dp_replicate=2))
    with pytest.raises(UnsupportedError, match="must come before"):
        simulate(LLAMA, training, [MegatronDistributedOptimizer(), ContextParallel()], mesh=Mesh(cp=2))


@pytest.mark.parametrize("case", TRAINED, ids=[case["name"] for case in TRAINED])
def test_recorded_phases_of_decoders_of_transformers(case):
    """Batch, masks, tables, loss and attention of one rank, as Trainer and accelerate run them; every phase exact."""
    program = lower(trained_plan(case["config"]))
    live, peaks = 0, {}
    for node in (program.load, program.cold, program.steady):
        peaks.clear()
        for moment in moments(node):
            live += sum(each.storage.size.allocated(program.bindings) for each in moment.step.births)
            peaks[moment.step.phase.value] = max(peaks.get(moment.step.phase.value, 0), live)
            live -= sum(each.storage.size.allocated(program.bindings) for each in moment.step.deaths)
    recorded = {name: peak for name, peak in case["peaks"].items() if name != "input"}
    assert {name: peaks[name] for name in recorded} == recorded


def trained_plan(config):
    layers, hidden, width, heads, kv_heads, vocab = config["shape"]
    keys = {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers, "vocab_size": vocab}
    keys |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 8192}
    family = config.get("family", "llama")
    keys |= {"qwen3": {"head_dim": hidden // heads}, "mistral": {"sliding_window": None}}.get(family, {})
    training = Training(
        micro_batch=config["batch"],
        seq_len=config["seq"],
        weights=TRAINING_DTYPES[config["dtype"]],
        # recorded on a CPU build of torch, which has no fused silu_backward or rms_norm
        kernel_workspace=False,
        fused_activation_backward=False,
        fused_norm=False,
    )
    cp = config["cp"]
    plan = make_plan(
        spec_from_class(f"{family.capitalize()}Config", keys, "x"), training, mesh=Mesh(cp=cp), rank=config["rank"]
    )
    owner = [Fsdp2(**{key: TRAINING_DTYPES[name] for key, name in config.get("fsdp", {}).items()})]
    checkpoints = [FullCheckpointing()] if config.get("ac") else []
    shards = ContextParallel(communication=config["comm"])
    return apply(plan, [*checkpoints, shards, *(owner if "fsdp" in config else [])])


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({"weights": FP32}, {}, "flash kernel alone, which has no fp32"),
        ({"weights": FP32, "autocast": BF16}, {}, "'autocast' with 'cp' above 1 is not modelled"),
        ({"sdpa_backend": "math"}, {}, "'sdpa_backend' must be auto or flash"),
        ({"attention": "eager"}, {}, "'attention' must be sdpa without a mask"),
        ({"attention_mask": "padded"}, {}, "'attention' must be sdpa without a mask"),
        ({}, {"head_dim": 12}, "a multiple of 8 up to 256: 12"),
        ({"seq_len": 30}, {}, "'seq_len' must be a multiple of 2 x cp 2 = 4: 30; use 28 or 32"),
    ],
)
def test_what_torch_does_not_shard_is_refused(options, config, words):
    model = spec_from_class("LlamaConfig", CONFIG | config, "tiny")
    training = Training(**{"weights": BF16, "seq_len": 32, **options})
    with pytest.raises(UnsupportedError, match=re.escape(words)):
        simulate(model, training, [ContextParallel()], mesh=Mesh(cp=2))


def test_other_families_are_refused_by_name():
    model = spec_from_class("GPT2Config", {"n_layer": 2}, "tiny")
    with pytest.raises(UnsupportedError, match="'cp' above 1 of gpt2 is not modelled; use llama"):
        apply(make_plan(model, Training(weights=BF16), mesh=Mesh(cp=2)), [ContextParallel()])
