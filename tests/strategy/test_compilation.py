"""Compiled layers: what they save against AOTAutograd's own saved sets, and what must hold of any approximation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError
from simulator import Mesh, Training, simulate
from simulator.plan import apply, make_plan
from simulator.reading import read_model, spec_from_config
from simulator.roles import Phase
from simulator.timeline import moments
from strategies.checkpointing import FullCheckpointing
from strategies.compilation import CompileLayers
from strategies.contract import StrategyContract
from strategies.deepspeed.zero3 import DeepSpeedZero3
from strategies.float8 import Float8
from strategies.fsdp2 import Fsdp2
from strategies.tensor_parallel import TensorParallel
from studies.cli.main import run
from tests.strategies import model_specs, trainings, uniform_llama

#: Per line one decoder layer of transformers 5.23, compiled by torch 2.13 on a CPU (`aot_autograd` with
#: `min_cut_rematerialization_partition` and Inductor's decompositions), and what its forward saves beside its inputs.
RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "compiled_layers.jsonl"
LINES = [json.loads(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
#: What flash attention on a GPU saves beside what the CPU's kernel does: two random seeds.
SEEDS = {"rng_state", "unused"}


class TestCompileLayers(StrategyContract):
    strategy = CompileLayers()


class TestCompileLayersBeforeSharding(StrategyContract):
    strategy = Fsdp2(param_dtype=BF16)
    mesh = Mesh(dp_shard=2)
    before = (CompileLayers(),)


class TestCompileRecomputedLayers(StrategyContract):
    strategy = FullCheckpointing()
    before = (CompileLayers(),)


def is_seed(storage):
    """Whether flash attention on a GPU made it, for dropout."""
    return not SEEDS.isdisjoint(storage.label.split("."))


def saved_by_layer(model, training, layer):
    """Bytes of every storage that one compiled layer makes and saves."""
    plan = apply(make_plan(model, training), [CompileLayers()])
    saves = {s for op in plan.graph.ops if op.slot == layer for s in plan.graph.uses(op).saves}
    made = [s for s in saves if s.slot == layer and not s.persistent]
    return {s.label: int(s.size.nbytes(plan.dimensions.bindings)) for s in made if not is_seed(s)}


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['family']}-{line['attention']}")
def test_a_layer_saves_what_the_partitioner_saves(line):
    training = Training(micro_batch=2, seq_len=48, weights=BF16, attention=line["attention"], kernel_workspace=False)
    saved = saved_by_layer(spec_from_config(line["config"], "recorded"), training, 1)
    assert sorted(saved.values()) == sorted(nbytes for *_, nbytes in line["saved"])


@pytest.mark.parametrize(
    ("family", "attention", "nbytes"),
    [("llama", "sdpa", 212736), ("llama", "eager", 344064), ("gemma2", "eager", 363264)],
)
def test_forward_allocates_what_inductor_does(family, attention, nbytes):
    """Buffers that are live at once in the wrapper code that Inductor writes for the forward of these layers."""
    config = next(x["config"] for x in LINES if (x["family"], x["attention"]) == (family, attention))
    training = Training(micro_batch=2, seq_len=48, weights=BF16, attention=attention, kernel_workspace=False)
    model = spec_from_config({**config, "num_hidden_layers": 3}, "recorded")
    program = simulate(model, training, [CompileLayers()]).program
    live, before, most = 0, None, 0
    for moment in moments(program.steady):
        before = live if before is None and moment.layer == 1 else before
        live += sum(_nbytes(s, program) for s in moment.step.births)
        if moment.layer == 1 and moment.step.phase is Phase.FORWARD:
            most = max(most, live - before)
        live -= sum(_nbytes(s, program) for s in moment.step.deaths)
    assert most == nbytes


def _nbytes(reference, program):
    """Bytes of a storage, random seeds left out."""
    storage = reference.storage
    return 0 if is_seed(storage) else int(storage.size.nbytes(program.bindings))


@settings(max_examples=20)
@given(model=model_specs(), training=trainings())
def test_a_step_begins_and_ends_as_without(model, training):
    """Only what happens in between changes: weights, gradients and states stay, and nothing leaks."""
    try:
        eager, compiled = (simulate(model, training, strategies) for strategies in ([], [CompileLayers()]))
    except UnsupportedError:
        assume(False)
    assert eager.parameters == compiled.parameters
    assert compiled.steady.start_bytes == compiled.steady.end_bytes == eager.steady.end_bytes


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_long_sequences_need_less(attention):
    training = Training(micro_batch=2, seq_len=512, weights=BF16, attention=attention)
    eager, compiled = (simulate(uniform_llama(8), training, each) for each in ([], [CompileLayers()]))
    assert compiled.peak.nbytes < eager.peak.nbytes


def test_the_graph_of_the_layers_alone_is_rewritten():
    plan = apply(make_plan(uniform_llama(2), Training(seq_len=16)), [CompileLayers()])
    assert {op.slot for op in plan.graph.ops if op.fused} == {0, 1}


@pytest.mark.parametrize(
    ("strategies", "mesh", "options", "problem"),
    [
        ([CompileLayers(), TensorParallel()], Mesh(tp=2), {}, "'compile' with tensor parallelism, float8 or ZeRO-3"),
        ([Float8(), CompileLayers()], Mesh(), {}, "'compile' with tensor parallelism, float8 or ZeRO-3"),
        ([CompileLayers(), DeepSpeedZero3()], Mesh(dp_shard=2), {}, "tensor parallelism, float8 or ZeRO-3"),
        ([CompileLayers()], Mesh(), {"implementation": "torchtune"}, "for implementation transformers or torchtitan"),
    ],
)
def test_refusals(strategies, mesh, options, problem):
    with pytest.raises(UnsupportedError, match=problem):
        simulate(uniform_llama(2), Training(seq_len=16, weights=BF16, **options), strategies, mesh=mesh)


def test_experts_are_refused():
    with pytest.raises(UnsupportedError, match="'compile' with a mixture of experts is not modelled"):
        simulate(read_model("qwen3-30b-a3b"), Training(seq_len=8, weights=BF16), [CompileLayers()])


def test_the_report_says_that_it_is_approximate(capsys):
    estimate = ["estimate", "smollm2-135m", "--gpus", "h100-80", "--seq-len", "64", "--dtype", "bf16"]
    assert run([*estimate, "--compile", "layers"]) == 0
    assert "approximate: --compile layers" in capsys.readouterr().out
    assert run([*estimate, "--compile", "model"]) == 2
    assert "'compile' model is not modelled yet; use layers" in capsys.readouterr().err
    assert run([*estimate, "--compile", "layer"]) == 2
    assert "no compile named 'layer'; did you mean 'layers'?" in capsys.readouterr().err
    assert run([*estimate, "--compile", "none"]) == 0
