"""Tensor parallelism and other implementations of a model, against recordings of PyTorch and as properties."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32, dtype
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.autograd import Autograd
from simulator.graph import Storage, Tensor
from simulator.lowering import lower
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.plan import Plan, Strategy, apply, make_plan
from simulator.report import Report, count_parameters
from simulator.roles import Phase
from simulator.sizes import ceil_div, product, symbol
from simulator.timeline import moments
from simulator.workload import Optimizer
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from strategies.tensor_parallel import TensorParallel
from tests.strategies import uniform_llama

DATA = Path(__file__).parents[1] / "data" / "oracle"
CASES = [json.loads(line) for line in (DATA / "tensor_parallel.jsonl").read_text().splitlines()]
TIMELINES = json.loads(gzip.decompress((DATA / "tensor_parallel_timelines.json.gz").read_bytes()))
IMPLEMENTATIONS = {"hf": "transformers", "titan": "torchtitan", "gpt": "plain"}
KINDS = {"adamw_fused": "fused", "adamw_foreach": "foreach", "adamw_loop": "for-loop"}


# recordings -----------------------------------------------------------------------------------------------------------


def model_of(config: dict[str, Any]) -> ModelSpec:
    layers, hidden, width, heads, key_heads, vocab, tied = config["shape"]
    gpt = config["impl"] == "gpt"
    attention = AttentionSpec(heads, key_heads, hidden // heads, bias=gpt)
    feed_forward = FeedForwardSpec(width, "gelu_new" if gpt else "silu", gated=not gpt, bias=gpt)
    family, rate = ("gpt2", 0.1) if gpt else ("llama", 0.0)
    layer = LayerSpec(attention, feed_forward)
    return ModelSpec("recorded", family, hidden, vocab, 8192, (layer,) * layers, tied, residual_dropout=rate)


def training_of(config: dict[str, Any]) -> Training:
    name = config.get("optim", "adamw_fused")
    known = Optimizer(name="sgd") if name == "sgd" else Optimizer(implementation=KINDS[name])
    return Training(
        micro_batch=config["batch"],
        seq_len=config["seq"],
        weights=dtype(config["dtype"]),
        clip=config.get("clip"),
        optimizer=known,
        implementation=IMPLEMENTATIONS[config["impl"]],
        sdpa_backend="flash",
        any_sdpa_backend=True,
        keep_inputs=True,
        fused_activation_backward=False,
        fused_norm=False,
        kernel_workspace=False,
    )


def plan_of(config: dict[str, Any], *, unrolled: bool = False) -> Plan:
    tp, world = config.get("tp", 1), config.get("world", 1)
    flags = {"sequence_parallel": bool(config.get("sp")), "loss_parallel": bool(config.get("loss_parallel"))}
    strategies: list[Strategy] = [FullCheckpointing()] if config.get("ac") else []
    strategies += [TensorParallel(**flags)] if tp > 1 else []
    strategies += [Fsdp2(param_dtype=BF16, reduce_dtype=FP32)] if world > tp else []
    mesh = Mesh(tp=tp, dp_shard=world // tp)
    return apply(make_plan(model_of(config), training_of(config), mesh=mesh, unrolled=unrolled), strategies)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_peaks(case):
    """Peaks of the cold and the steady step equal recorded ones to the byte."""
    report = Report(plan := plan_of(case["config"]), lower(plan))
    assert report.cold.nbytes == case["first_step_peak_bytes"]
    assert report.steady.nbytes == case["peak_bytes"]
    assert report.parameters == case["n_params_total"]
    backward = (Phase.BACKWARD, Phase.RECOMPUTE)
    phases = {"backward": backward, "forward": (Phase.FORWARD,), "optimizer": (Phase.OPTIMIZER,)}
    if plan.mesh.dp_shard == 1:  # a weight gathered again is recorded with the phase of its first time
        assert report.steady.phase in phases[case["peak_phase"]]


MEGATRON = [json.loads(line) for line in (DATA / "megatron_tensor_parallel.jsonl").read_text().splitlines()]


def megatron_plan(config: dict[str, Any], **options: Any) -> Plan:
    layers, hidden, width, heads, key_heads, vocab, tied = config["shape"]
    gpt = config["family"] == "gpt2"
    attention = AttentionSpec(heads, key_heads, hidden // heads, bias=gpt)
    layer = LayerSpec(attention, FeedForwardSpec(width, "gelu_new" if gpt else "silu", gated=not gpt, bias=gpt))
    rates = {"embedding_dropout": 0.1, "residual_dropout": 0.1} if gpt else {}
    model = ModelSpec("recorded", config["family"], hidden, vocab, config["seq"], (layer,) * layers, tied, **rates)
    training = attrs.evolve(training_of({"impl": "titan", **config}), implementation="megatron")
    sharded = TensorParallel(sequence_parallel=bool(config.get("sp")))
    return apply(make_plan(model, training, mesh=Mesh(tp=config.get("tp", 1)), **options), [sharded])


@pytest.mark.parametrize("case", MEGATRON, ids=lambda case: case["name"])
def test_recorded_peaks_of_megatron(case):
    """Megatron-core's GPTModel, fused kernels as one op each: both peaks equal recorded ones to the byte."""
    report = Report(plan := megatron_plan(case["config"]), lower(plan))
    assert report.cold.nbytes == case["first_step_peak_bytes"]
    assert report.steady.nbytes == case["peak_bytes"]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_saved_bytes_of_a_megatron_layer(tp):
    """34 s b h / t per layer with sequence parallelism and flash attention (arXiv 2205.05198, table 2)."""
    config = {"family": "gpt2", "shape": [3, 64, 256, 4, 4, 250, True], "tp": tp, "sp": True}
    plan = megatron_plan({**config, "dtype": "bf16", "batch": 2, "seq": 32}, unrolled=True)
    saved = {s for s, op, why in plan.graph.edges.edges(data=True) if "saves" in why and op.slot == 1}
    own = [s for s in saved if not s.persistent and s.dtype.bits <= 16]  # statistics of norms and attention aside
    total = sum(s.size.nbytes(plan.dimensions.bindings) for s in own)
    assert total == 34 * 32 * 2 * 64 // tp


#: Ops that are one here and two kernels there, or the other way round.
JOINED = {("all_gather_into_tensor", "cat"), ("cat", "reduce_scatter_tensor")}


def joined(ops: list[tuple[str, list[int], list[int]]]) -> list[tuple[list[int], list[int]]]:
    """Births and deaths, op by op, with collectives and their copies as one."""
    found: list[tuple[str, list[int], list[int]]] = []
    for name, births, deaths in ops:
        short = name.removesuffix(".default")
        if short == "free" and found:
            found[-1][2].extend(deaths)
        elif found and not found[-1][2] and (found[-1][0], short) in JOINED:
            found[-1] = (short, found[-1][1] + births, deaths)
        else:
            found.append((short, list(births), list(deaths)))
    return [(sorted(births), sorted(deaths)) for name, births, deaths in found if name != "embedding_dense_backward"]


def accumulate_out_of_place(self: Autograd, old: Tensor | None, new: Tensor) -> Tensor:
    """The recordings were made under a dispatch mode, where the engine never accumulates in place."""
    if old is None:
        return new
    result = self.like("add(engine)", old)
    self._made.clear()
    self.recorder.release(old.storage)
    self.recorder.release(new.storage)
    return result


@pytest.mark.parametrize("name", sorted(TIMELINES))
def test_recorded_timelines(name, monkeypatch):
    """Every op of a steady step allocates and frees what it did in the recording."""
    monkeypatch.setattr(Autograd, "_accumulate", accumulate_out_of_place)
    config = next(case["config"] for case in CASES if case["name"] == name)
    program = lower(plan_of(config, unrolled=True))

    def sizes(references):
        return [reference.storage.size.allocated(program.bindings) for reference in references]

    steps = [moment.step for moment in moments(program.steady)]
    ops = [(step.name, sizes(step.births), sizes(step.deaths)) for step in steps if step.phase is not Phase.INPUT]
    assert joined(ops) == joined(TIMELINES[name])


# properties -----------------------------------------------------------------------------------------------------------


class TestMoreTensorParallel(StrategyContract):
    strategy = TensorParallel()
    mesh = Mesh(tp=1)
    axis = "tp"


class TestFsdp2OfShards(StrategyContract):
    strategy = Fsdp2(param_dtype=BF16, reduce_dtype=FP32)
    mesh = Mesh(tp=2, dp_shard=2)
    axis = "dp_shard"
    before = (TensorParallel(),)


class Torchtitan:
    """On torchtitan's code, which knows sequence parallelism."""

    def plans(self, mesh=None, *, unrolled=False):
        for plan in super().plans(mesh, unrolled=unrolled):
            if plan.training.autocast is None:
                yield attrs.evolve(plan, training=attrs.evolve(plan.training, implementation="torchtitan"))


class TestMegatron(StrategyContract):
    strategy = TensorParallel(sequence_parallel=True)
    mesh = Mesh(tp=2)

    def plans(self, mesh=None, *, unrolled=False):
        for plan in super().plans(mesh, unrolled=unrolled):
            if plan.training.autocast is None:
                yield attrs.evolve(plan, training=attrs.evolve(plan.training, implementation="megatron"))


class TestSequenceParallel(Torchtitan, StrategyContract):
    strategy = TensorParallel(sequence_parallel=True, loss_parallel=True)
    mesh = Mesh(tp=2)


SHARDED = st.builds(TensorParallel, sequence_parallel=st.booleans(), loss_parallel=st.booleans())


@st.composite
def sharded_plans(draw: st.DrawFn) -> Plan:
    """Models of torchtitan's code that a drawn degree divides, but for the vocabulary."""
    tp = draw(st.sampled_from([2, 3, 4]))
    key_heads = tp * draw(st.integers(1, 2))
    heads = key_heads * draw(st.integers(1, 2))
    attention = AttentionSpec(heads, key_heads, 2 * draw(st.integers(1, 8)))
    layer = LayerSpec(attention, FeedForwardSpec(tp * draw(st.integers(1, 20))))
    vocab = draw(st.integers(tp, 100))
    model = ModelSpec("drawn", "llama", 4 * draw(st.integers(1, 12)), vocab, 64, (layer,) * draw(st.integers(1, 4)))
    training = Training(
        micro_batch=draw(st.integers(1, 3)),
        seq_len=tp * draw(st.integers(1, 8)),
        weights=draw(st.sampled_from([FP32, BF16])),
        implementation="torchtitan",
        optimizer=Optimizer(implementation=draw(st.sampled_from(["fused", "foreach", "for-loop"]))),
    )
    strategies: list[Strategy] = [draw(SHARDED)]
    if draw(st.booleans()):
        strategies.insert(0, FullCheckpointing())
    return apply(make_plan(model, training, mesh=Mesh(tp=tp)), strategies)


def persistent(report: Report) -> int:
    return report.steady.end_bytes


def storages(plan: Plan) -> list[Storage]:
    return [node for node in plan.graph.edges if isinstance(node, Storage)]


@settings(max_examples=60)
@given(sharded_plans())
def test_the_whole_model_is_counted(plan):
    """Sharding changes no parameter count, and what ranks hold adds up to the model, padding and replicas aside."""
    whole = attrs.evolve(plan, mesh=Mesh(), tensor_parallel=None)
    assert count_parameters(plan) == count_parameters(whole)
    bindings, degree = plan.dimensions.bindings, plan.mesh.tp
    for tensor, alone in zip(plan.graph.parameters, whole.graph.parameters, strict=True):
        held = tensor.storage.size.elements(bindings)
        total = alone.storage.size.elements(whole.dimensions.bindings)
        if tensor.storage.whole is None:
            assert held == total  # replicated
        else:
            rows = total // plan.model.vocab if "V/tp" in tensor.storage.size.dims else 0
            assert total <= degree * held <= total + (degree - 1) * rows


@settings(max_examples=60)
@given(sharded_plans())
def test_ranks_hold_less_than_one_device(plan):
    """Between steps a rank never holds more than a device that is alone, and mostly a lot less."""
    alone = attrs.evolve(plan, mesh=Mesh(), tensor_parallel=None)
    assert persistent(Report(plan, lower(plan))) <= persistent(Report(alone, lower(alone)))


@settings(max_examples=60)
@given(sharded_plans())
def test_symbols_and_ints_agree(plan):
    """A size with symbols for dimensions, the degree included, is the size with ints once they are put in."""
    values = dict(plan.dimensions.bindings)
    symbols = {name: symbol(name) for name in values if "/" not in name}
    formulas: dict[str, Any] = dict(symbols)
    for name in values:
        if name.endswith("/tp"):
            formulas[name] = ceil_div(product(name.removesuffix("/tp").split("*"), formulas), symbols["tp"])
        elif "/" in name:
            formulas[name] = values[name]
    numbers = {symbols[name]: value for name, value in values.items() if name in symbols}
    for storage in {s.size: s for s in storages(plan)}.values():
        expression = storage.size.nbytes(formulas)
        number = expression.subs(numbers) if hasattr(expression, "subs") else expression
        assert number == storage.size.nbytes(values)


def test_saved_by_a_sequence_parallel_layer():
    """What a layer saves with the loss sharded too: a part shared by ranks, and its two gathered inputs.

    Closed form of Llama 3 8B's 8 layers at 4096 tokens in bf16: 544.01 + 8408.27/t MiB, 544 = (2 * 8 + 1) * 32.
    """
    layer = LayerSpec(AttentionSpec(32, 8, 128), FeedForwardSpec(14336))
    model = ModelSpec("llama", "llama", 4096, 128256, 8192, (layer,) * 8)
    training = Training(seq_len=4096, weights=BF16, implementation="torchtitan", fused_norm=False)
    for tp in (2, 4, 8):
        strategy = TensorParallel(sequence_parallel=True, loss_parallel=True)
        plan = apply(make_plan(model, training, mesh=Mesh(tp=tp), unrolled=True), [strategy])
        bindings = plan.dimensions.bindings
        edges = plan.graph.edges.edges(data=True)
        saved = {s for s, _, why in edges if "saves" in why and not s.persistent and s.role.value != "input"}
        total = sum(s.size.allocated(bindings) for s in saved)
        assert total / 2**20 == pytest.approx(544.01 + 8408.27 / tp, abs=0.02)


# errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "strategies", "training", "said"),
    [
        (Mesh(tp=3), [TensorParallel()], Training(), "'tp' must divide the model's heads: 4 / 3; use 2"),
        (Mesh(tp=2), [TensorParallel(sequence_parallel=True)], Training(), "needs implementation torchtitan"),
        (Mesh(tp=2), [TensorParallel(async_tp=True)], Training(), "'async_tp' true is not modelled yet"),
        (Mesh(tp=2), [TensorParallel(), TensorParallel()], Training(), "must come before"),
        (Mesh(tp=2), [TensorParallel()], Training(optimizer=Optimizer(name="adafactor")), "optimizer adafactor"),
        (Mesh(tp=2), [TensorParallel()], Training(optimizer=Optimizer(name="sgd", momentum=0.9)), "'momentum'"),
        (Mesh(tp=2), [TensorParallel()], Training(clip=1.0), "'clip' 1.0 fails in torch"),
        (Mesh(tp=2, dp_replicate=2), [TensorParallel(), Ddp()], Training(), "use fsdp2"),
        (Mesh(), [FullCheckpointing()], Training(implementation="megatron"), "is not modelled: leave it out"),
        (Mesh(), [], Training(implementation="megatron", weights=FP32, autocast=BF16), "'autocast' must be left out"),
        (Mesh(), [], Training(implementation="torchtitan", attention="eager"), "'attention' must be sdpa"),
        (Mesh(), [], Training(implementation="plain"), "'implementation' of llama must be transformers or megatron"),
    ],
)
def test_refusals_say_the_way_out(mesh, strategies, training, said):
    with pytest.raises(UnsupportedError) as error:
        simulate(uniform_llama(2), training, strategies, mesh=mesh)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["sequence_parallel", "loss_parallel"])
def test_switches_are_checked(field):
    with pytest.raises(UsageError, match=field):
        TensorParallel(**{field: "yes"})


def test_unknown_implementation():
    with pytest.raises(UsageError, match="torchtitan"):
        Training(implementation="torchtitam")
