"""What a row of measured peaks says in our words: every field that bears on memory is used, or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs

from hardware.dtypes import TRAINING_DTYPES, DType
from hardware.errors import UnsupportedError, UsageError
from simulator.mesh import Mesh
from simulator.model import ModelSpec
from simulator.plan import Strategy
from simulator.workload import Optimizer, Training
from strategies.checkpointing import FullCheckpointing
from strategies.context_parallel import ContextParallel
from strategies.megatron import MegatronDistributedOptimizer
from strategies.megatron_pipeline import MegatronPipeline
from strategies.tensor_parallel import TensorParallel
from studies.options import TASKS
from studies.validation.frameworks import FRAMEWORKS, Framework
from studies.validation.measured_model import measured_model

#: What a run can be measured by -> why it is not simulated; None where it is.
METRICS: dict[str, str | None] = {
    "allocated": None,
    "active": None,
    "reserved": "needs the caching allocator",
    "process": "needs the allocator and what lies outside it",
    "nvidia_smi": "needs the allocator and what lies outside it",
}
#: Fields that say where a row is from, or that leave tensor bytes as they are.
_HARMLESS = {"name", "source", "framework_version", "gpu", "other_expected", "assumed", "notes"}
_HARMLESS |= {"metric", "expected_bytes", "tolerance_pct", "bar"}
#: Techniques that are not simulated: only null is.
_ABSENT = ("lora", "quantisation", "offload", "inference")
_DISPATCH = {"dispatch": ("alltoall",)}
_OPTIMIZERS = {"AdamW": "adamw", "Adam": "adam"}
_IMPLEMENTATIONS = {"forloop": "for-loop", "foreach": "foreach", "fused": "fused"}
_TORCH = re.compile(r"(\d+)\.(\d+)[.+\da-z]*\b.*")
_RANK = re.compile(r"(?:max over ranks \()?rank (\d+)\b.*")
#: How the moments begin at which a peak was read -> whether the first step was left out of it.
_PHASES = {"whole run": False, "train stage": False, "steady step": True}
#: Axes of the mesh that are simulated.
_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
#: Of a mesh with pipeline stages: how many each rank has.
_CHUNKS = "virtual_pp"
_FIELDS = {"model", "config", "framework", "torch_version", "task", "num_gpus", "mesh", "strategy", "strategy_options"}
_FIELDS |= {"sequence_parallel", "pp_schedule", "param_dtype", "compute_dtype", "grad_dtype", "reduce_dtype"}
_FIELDS |= {"optimizer_state_dtype", "master_weights", "optimizer", "optimizer_impl", "micro_batch", "seq_len"}
_FIELDS |= {"num_microbatches", "attention", "kernels", "checkpointing", "loss", "phase", "rank", "moe", *_ABSENT}


@attrs.frozen
class Run:
    """What a row asks to be simulated, and how the answer is to be read."""

    model: ModelSpec
    training: Training
    strategies: tuple[Strategy, ...]
    mesh: Mesh
    rank: int
    steady_only: bool
    notes: tuple[str, ...]


def measured_run(row: Mapping[str, Any]) -> Run:
    """The run of one row.

    Raises:
        UnsupportedError: a metric, framework, technique or value that is not simulated yet, by its name.
        UsageError: one that is wrong.
    """
    _check_metric(row["metric"])
    unknown = sorted(set(row) - _HARMLESS - _FIELDS)
    if unknown:
        raise UnsupportedError(f"field {unknown[0]!r} is not known")
    lacking = sorted(_FIELDS - {"model"} - set(row))
    if lacking:
        raise UsageError(f"field {lacking[0]!r} must be there, null where it is not known")
    _one_of("task", row.get("task"), TASKS)
    for field in _ABSENT:
        _one_of(field, row.get(field), (None,))
    framework = _framework(row)
    notes = framework.check(_flat(row))
    _check_dtypes(row, framework)
    mesh = _mesh(row)
    version, more = _torch(row.get("torch_version"))
    rank = _rank(row.get("rank"), mesh)
    strategies = (*_pipeline(row, mesh, rank), *_checkpointing(row), *_parallel(row, mesh))
    notes += [*more, *(["active is taken as allocated: no block awaits another stream"] * (row["metric"] == "active"))]
    return Run(
        model=measured_model(row),
        training=_training(row, framework, version),
        strategies=strategies,
        mesh=mesh,
        rank=rank // mesh.tp % mesh.dp_cp,
        steady_only=_steady_only(row.get("phase")),
        notes=tuple(notes),
    )


def _one_of(field: str, value: Any, known: Any) -> None:
    if not any(value == each and type(value) is type(each) for each in known):
        only = ", ".join(json.dumps(each) for each in known)
        raise UnsupportedError(f"{field} {json.dumps(value)} is not simulated yet, only {only}")


def _check_metric(metric: str) -> None:
    why = METRICS[metric]
    if why is not None:
        raise UnsupportedError(f"metric {json.dumps(metric)} is not modelled yet: it {why}")


def _framework(row: Mapping[str, Any]) -> Framework:
    _one_of("framework", row.get("framework"), FRAMEWORKS)
    return FRAMEWORKS[row["framework"]]


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The settings of a row that belong to its framework, nested ones by dotted names."""
    for field in ("kernels", "strategy_options", "checkpointing"):
        values = row.get(field) or {}
        if not isinstance(values, dict):
            raise UsageError(f"{field!r} must be an object: {json.dumps(values)}")
        yield from ((f"{field}.{key}", value) for key, value in values.items())
    yield from ((field, row.get(field)) for field in ("attention", "loss", "strategy", "pp_schedule"))


def _check_dtypes(row: Mapping[str, Any], framework: Framework) -> None:
    """Gradients and states are of the weights' element type, or of the one that the framework gives them."""
    weights = row.get("param_dtype")
    _one_of("param_dtype", weights, TRAINING_DTYPES)
    _one_of("compute_dtype", row.get("compute_dtype"), (weights,))
    for field in ("grad_dtype", "optimizer_state_dtype"):
        _one_of(field, row.get(field), (framework.main_dtype or weights,))
    _one_of("master_weights", row.get("master_weights"), (framework.main_dtype,))
    _one_of("reduce_dtype", row.get("reduce_dtype"), (framework.main_dtype, None))


def _mesh(row: Mapping[str, Any]) -> Mesh:
    degrees = row.get("mesh") or {}
    if not isinstance(degrees, dict):
        raise UsageError(f"'mesh' must be an object: {json.dumps(degrees)}")
    if row["framework"] != "megatron":
        _one_of("mesh.ep", degrees.get("ep", 1), (1,))
    stages = row["framework"] == "megatron" and degrees.get("pp", 1) != 1
    if not stages:
        _one_of("mesh.pp", degrees.get("pp", 1), (1,))
    for axis, degree in degrees.items():
        if axis not in _AXES and not (stages and axis == _CHUNKS):
            _one_of(f"mesh.{axis}", degree, (1,))
    mesh = Mesh(**{axis: degrees.get(axis, 1) for axis in _AXES})
    if row.get("num_gpus") != mesh.world:
        raise UsageError(f"'num_gpus' must be the product of 'mesh', {mesh.world}: {json.dumps(row.get('num_gpus'))}")
    return mesh


def _pipeline(row: Mapping[str, Any], mesh: Mesh, rank: int) -> tuple[Strategy, ...]:
    """The pipeline stage of a global rank: its data-parallel ranks, each with its shards, are next to each other."""
    if mesh.pp == 1:
        return ()
    chunks = row["mesh"].get(_CHUNKS, 1)
    if (row["pp_schedule"] == "1F1B") != (chunks == 1):
        raise UsageError(f"'pp_schedule' must be 1F1B just where 'virtual_pp' is 1: {row['pp_schedule']}, {chunks}")
    overlaps = (row.get("strategy_options") or {}).get("overlap_p2p", True)
    return (MegatronPipeline(rank=rank // (mesh.tp * mesh.dp_cp), chunks=chunks, overlap_p2p_comm=overlaps),)


def _checkpointing(row: Mapping[str, Any]) -> tuple[Strategy, ...]:
    mode = (row.get("checkpointing") or {}).get("mode", "none")
    _one_of("checkpointing.mode", mode, ("none", "full"))
    return (FullCheckpointing(),) if mode == "full" else ()


def _parallel(row: Mapping[str, Any], mesh: Mesh) -> tuple[Strategy, ...]:
    options = row.get("strategy_options") or {}
    sequence = row.get("sequence_parallel") or False
    _one_of("sequence_parallel", sequence, (False, True) if mesh.tp > 1 else (False,))
    shards: tuple[Strategy, ...] = (TensorParallel(sequence_parallel=sequence),) if mesh.tp > 1 else ()
    if mesh.cp > 1:
        shards += (ContextParallel(communication=options.get("cp_comm_type") or "p2p"),)
    if row.get("strategy") != "megatron_distopt":
        return shards
    taken = ("overlap_grad_reduce", "gradient_accumulation_fusion")
    return (*shards, MegatronDistributedOptimizer(**{key: options.get(key, False) for key in taken}))


def _training(row: Mapping[str, Any], framework: Framework, version: tuple[int, int]) -> Training:
    return Training(
        micro_batch=row["micro_batch"],
        seq_len=row["seq_len"],
        gradient_accumulation=row["num_microbatches"],
        weights=_dtype(row["param_dtype"]),
        optimizer=_optimizer(row),
        torch=version,
        implementation=framework.implementation,
        **framework.training(row["attention"], row["loss"]),
        **_experts(row),
    )


def _experts(row: Mapping[str, Any]) -> dict[str, Any]:
    """How tokens reach their experts."""
    routing = row.get("moe")
    if routing is None or row["framework"] != "megatron":
        _one_of("moe", routing, (None,))
        return {}
    if not isinstance(routing, dict):
        raise UsageError(f"'moe' must be an object: {json.dumps(routing)}")
    for key, value in routing.items():
        if key not in ("capacity", "imbalance"):
            _one_of(f"moe.{key}", value, _DISPATCH.get(key, (None,)))
    capacity = routing.get("capacity")
    if capacity is None:
        return {"expert_imbalance": routing.get("imbalance", 1.0)}
    _one_of("moe.capacity.drop", capacity.get("drop"), (True,))
    _one_of("moe.capacity.pad_to_capacity", capacity.get("pad_to_capacity"), (True,))
    return {"capacity_factor": capacity["factor"]}


def _dtype(name: str) -> DType:
    return TRAINING_DTYPES[name]


def _optimizer(row: Mapping[str, Any]) -> Optimizer:
    _one_of("optimizer", row.get("optimizer"), _OPTIMIZERS)
    _one_of("optimizer_impl", row.get("optimizer_impl"), _IMPLEMENTATIONS)
    name, how = _OPTIMIZERS[row["optimizer"]], _IMPLEMENTATIONS[row["optimizer_impl"]]
    return Optimizer(name=name, implementation=how)


def _torch(text: Any) -> tuple[tuple[int, int], list[str]]:
    """The version whose behaviour is simulated; where none is said, the newest."""
    match = _TORCH.fullmatch(text) if isinstance(text, str) else None
    if match is not None:
        return (int(match[1]), int(match[2])), []
    return Training().torch, [f"torch_version is not said ({json.dumps(text)}): the newest is simulated"]


def _rank(rank: Any, mesh: Mesh) -> int:
    """The global rank."""
    match = _RANK.fullmatch(rank) if isinstance(rank, str) else None
    number = int(match[1]) if match else rank
    if type(number) is not int or not 0 <= number < mesh.world:
        raise UsageError(f"'rank' must name one of {mesh.world} ranks: {json.dumps(rank)}")
    return number


def _steady_only(phase: Any) -> bool:
    for start, steady in _PHASES.items():
        if isinstance(phase, str) and phase.startswith(start):
            return steady
    raise UnsupportedError(f"phase {json.dumps(phase)} is not simulated yet, only {', '.join(_PHASES)}")
