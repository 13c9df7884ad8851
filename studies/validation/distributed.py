"""Case files of the distributed oracle: what a line of one rank among many says in our words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from hardware.dtypes import DType, dtype
from hardware.errors import UnsupportedError, UsageError
from simulator.mesh import Mesh
from simulator.model import ModelSpec
from simulator.plan import Strategy
from simulator.reading import spec_from_class
from simulator.report import StepPeak
from simulator.roles import Role
from simulator.workload import Optimizer, Training
from strategies.checkpointing import FullCheckpointing
from strategies.fsdp1 import Fsdp1
from strategies.fsdp2 import Fsdp2
from strategies.megatron import MegatronDistributedOptimizer
from strategies.tensor_parallel import TensorParallel
from strategies.zero_redundancy import ZeroRedundancy
from studies.validation.liger_switches import liger_of
from studies.validation.recorded_ddp import RecordedDdp
from studies.validation.recorded_megatron import recorded_megatron
from studies.validation.recorded_pipeline import recorded_pipeline

#: The oracle's names of models: layers, hidden, feed-forward width, heads, key heads, vocabulary, tied embeddings.
_SHAPES = {
    "llama-3.2-1b": (16, 2048, 8192, 32, 8, 128256, True),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128256, False),
    "qwen3-8b": (36, 4096, 12288, 32, 8, 151936, False),
    "gpt2-xl": (48, 1600, 6400, 25, 25, 50257, True),
    "tiny": (4, 256, 1024, 8, 4, 1024, False),
    "gpt2-tiny": (3, 96, 384, 4, 4, 517, True),
}
_OPTIMIZERS = {
    "adamw_fused": Optimizer(name="adamw", implementation="fused"),
    "adamw_foreach": Optimizer(name="adamw", implementation="foreach"),
    "adamw_loop": Optimizer(name="adamw", implementation="for-loop"),
    "sgd": Optimizer(name="sgd"),
}
#: Whose code of the model is run.
_IMPLEMENTATIONS = {"hf": "transformers", "titan": "torchtitan", "gpt": "plain"}
#: Options that every kind of case may have.
_COMMON = {"kind", "model", "layers", "seq", "batch", "world", "ac", "impl", "dtype", "optim", "grad_accum", "autocast"}
_COMMON |= {"rank", "liger"}
#: The part of a step as the oracle names it.
PHASES = {"forward": "forward", "backward": "backward", "recompute": "backward", "optimizer": "optimizer"}
#: Roles that are compared one by one -> the oracle's categories for them.
COMPARED = {
    "gathered parameter": ({Role.GATHERED}, {"unsharded_param"}),
    "gather buffer": ({Role.GATHER}, {"all_gather_buffer", "all_gather_input_cast"}),
    # outputs of the reduce-scatter become gradients, or are cast to them: they are not compared
    "reduce-scatter input": ({Role.REDUCE}, {"reduce_scatter_input"}),
    "bucket": ({Role.BUCKET}, {"ddp_bucket"}),
    "receive buffer": ({Role.RECEIVED}, {"recv_buffer_fwd", "recv_buffer_bwd"}),
    "activation": (
        # whatever forward makes that no framework names; among it, there, the shards kept from forward to backward
        {Role.ACTIVATION, Role.LOSS_HEAD, Role.WEIGHT_CAST, Role.POST_FORWARD_SHARD},
        {"activation", "forward_temp"},
    ),
}


@attrs.frozen
class Case:
    """What a line asks to be simulated."""

    model: ModelSpec
    training: Training
    strategies: tuple[Strategy, ...]
    mesh: Mesh
    rank: int


def distributed_case(line: Mapping[str, Any]) -> Case:
    """The case of one line; options it leaves out have the oracle's defaults.

    Raises:
        UnsupportedError: a kind, family or option that is not simulated yet.
        UsageError: one that is wrong.
    """
    config = line["config"]
    kind = config.get("kind")
    if kind == "megatron_pp":
        return Case(*recorded_megatron(config))
    if kind not in _KINDS:
        raise UnsupportedError(f"kind {json.dumps(kind)} is not simulated yet, only {', '.join(_KINDS)}")
    known, parallelise = _KINDS[kind]
    unknown = sorted(key for key, value in config.items() if key not in known | _COMMON and value is not None)
    if unknown:
        raise UnsupportedError(f"case option {unknown[0]!r} is not known for kind {kind}")
    mesh, strategies = parallelise(config)
    if kind == "pp":
        strategies = (recorded_pipeline(line), *strategies)
        config = {"impl": "titan", **config, "grad_accum": config.get("microbatches", 1)}
    checkpointing: tuple[Strategy, ...] = (FullCheckpointing(),) if config.get("ac") else ()
    model = _model(config)
    training = attrs.evolve(_training(config), liger=liger_of(config.get("liger"), model.family))
    first, others = (strategies[:1], strategies[1:]) if kind == "pp" else ((), strategies)
    return Case(model, training, (*first, *checkpointing, *others), mesh, config.get("rank", 0))


def _model(config: Mapping[str, Any]) -> ModelSpec:
    name = config.get("model")
    if name not in _SHAPES:
        raise UnsupportedError(f"model {json.dumps(name)} is not one of the oracle's: {', '.join(_SHAPES)}")
    layers, hidden, width, heads, key_heads, vocab, tied = _SHAPES[name]
    layers = config.get("layers") or layers
    if name.startswith("gpt2"):
        plain = config.get("impl") == "gpt"  # positions as many as the sequence has, and a head of its own
        positions = _length(config) if plain else max(1024, _length(config))
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": positions}
        sizes["tie_word_embeddings"] = not plain
        return spec_from_class("GPT2Config", {"vocab_size": vocab, **sizes}, name)
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": key_heads, "intermediate_size": width, "vocab_size": vocab}
    family = "Qwen3Config" if name.startswith("qwen3") else "LlamaConfig"
    return spec_from_class(family, {**sizes, "tie_word_embeddings": tied}, name)


def _length(config: Mapping[str, Any]) -> int:
    return int(config.get("seq", 4096))


def _training(config: Mapping[str, Any]) -> Training:
    optimizer = config.get("optim", "adamw_fused")
    if optimizer not in _OPTIMIZERS:
        raise UnsupportedError(f"optim {json.dumps(optimizer)} is not simulated, only {', '.join(_OPTIMIZERS)}")
    implementation = config.get("impl", "hf")
    if implementation not in _IMPLEMENTATIONS:
        raise UnsupportedError(
            f"impl {json.dumps(implementation)} is not simulated, only {', '.join(_IMPLEMENTATIONS)}"
        )
    return Training(
        micro_batch=config.get("batch", 1),
        seq_len=_length(config),
        gradient_accumulation=config.get("grad_accum", 1),
        weights=_dtype(config.get("dtype", "fp32")) or dtype("fp32"),
        autocast=_dtype(config.get("autocast")),
        optimizer=_OPTIMIZERS[optimizer],
        # the oracle takes the flash kernel whatever the element type, and holds one batch for ever
        sdpa_backend="flash",
        any_sdpa_backend=True,
        keep_inputs=True,
        implementation=_IMPLEMENTATIONS[implementation],
        # it runs a CPU build of torch: no fused silu_backward or rms_norm; and it cannot see inside kernels
        fused_activation_backward=False,
        fused_norm=False,
        kernel_workspace=False,
    )


def _dtype(name: Any) -> DType | None:
    return None if name is None else dtype(name)


def _ranks(config: Mapping[str, Any]) -> int:
    world = config.get("world", 1)
    if type(world) is not int or world < 1:
        raise UsageError(f"'world' must be a whole number of ranks: {json.dumps(world)}")
    return world


_Parallel = tuple[Mesh, tuple[Strategy, ...]]


def _single(_: Mapping[str, Any]) -> _Parallel:
    return Mesh(), ()


def _replicated(config: Mapping[str, Any]) -> _Parallel:
    ddp = RecordedDdp(
        gradient_as_bucket_view=bool(config.get("gradient_as_bucket_view")),
        bucket_cap_mb=config.get("bucket_cap_mb") or 0,
        static_graph=bool(config.get("static_graph")),
    )
    return Mesh(dp_replicate=_ranks(config)), (ddp,)


def _optimizer_sharded(config: Mapping[str, Any]) -> _Parallel:
    mesh, strategies = _replicated(config)
    optimizer = ZeroRedundancy(parameters_as_bucket_view=bool(config.get("parameters_as_bucket_view")))
    return mesh, (*strategies, optimizer)


def _fully_sharded(config: Mapping[str, Any]) -> _Parallel:
    replicas = config.get("replicate", 1)
    if _ranks(config) % replicas:
        raise UsageError(f"'replicate' must divide the world of {_ranks(config)}: {replicas}")
    return Mesh(dp_replicate=replicas, dp_shard=_ranks(config) // replicas), (_fsdp2(config),)


def _tensor_parallel(config: Mapping[str, Any]) -> _Parallel:
    """Tensor parallel, and on the ranks that are left FSDP2."""
    degree = config.get("tp", 1)
    if type(degree) is not int or degree < 1 or _ranks(config) % degree:
        raise UsageError(f"'tp' must divide the world of {_ranks(config)}: {json.dumps(degree)}")
    mesh = Mesh(dp_shard=_ranks(config) // degree, tp=degree)
    shards = TensorParallel(sequence_parallel=bool(config.get("sp")), loss_parallel=bool(config.get("loss_parallel")))
    return mesh, (shards, *([_fsdp2(config)] if mesh.dp_shard > 1 else []))


def _fsdp2(config: Mapping[str, Any]) -> Fsdp2:
    return Fsdp2(
        reshard_after_forward=config.get("reshard_after_forward", True),
        root_reshard_after_forward=bool(config.get("root_raf")),
        param_dtype=_dtype(config.get("param_dtype", "bf16")),
        reduce_dtype=_dtype(config.get("reduce_dtype", "fp32")),
        wrap={"root": "root", "titan": "layer+embedding+head"}.get(config.get("wrap", ""), "layer"),
        prefetch=config.get("explicit_prefetch") or 0,
        sync="every" if config.get("sync_every") else "last",
        offload=bool(config.get("cpu_offload")),
    )


def _flat_sharded(config: Mapping[str, Any]) -> _Parallel:
    mesh, _ = _fully_sharded({key: config[key] for key in ("world", "replicate") if key in config})
    fsdp1 = Fsdp1(
        sharding_strategy=str(config.get("sharding", "FULL_SHARD")).lower(),
        param_dtype=_dtype(config.get("param_dtype", "bf16")),
        reduce_dtype=_dtype(config.get("reduce_dtype", "fp32")),
        backward_prefetch=config.get("backward_prefetch", "pre"),
        forward_prefetch=bool(config.get("forward_prefetch")),
        keep_low_precision_grads=bool(config.get("keep_low_precision_grads")),
        use_orig_params=bool(config.get("use_orig_params")),
        wrap=config.get("wrap", "layer"),
        sync="every" if config.get("sync_every") else "last",
    )
    return mesh, (fsdp1,)


def _pipelined(config: Mapping[str, Any]) -> _Parallel:
    """What shares the work of each stage: `dp` ranks of torchtitan's `fully_shard` or of DDP, and `tp` ranks."""
    pp, dp, data = config.get("pp", 1), config.get("dp", 1), config.get("data")
    if data not in (None, "fsdp2", "ddp"):
        raise UnsupportedError(f"'data' {json.dumps(data)} is not simulated in a pipeline, only fsdp2 and ddp")
    copies = config.get("replicate", 1)
    shards, replicas = (dp // copies, copies) if data == "fsdp2" else (1, dp)
    mesh = Mesh(pp=pp, dp_shard=shards, dp_replicate=replicas, tp=config.get("tp", 1))
    found: list[Strategy] = []
    if mesh.tp > 1:
        found.append(TensorParallel(sequence_parallel=bool(config.get("sp"))))
    if data == "fsdp2":
        usual = {"wrap": "titan", "reshard_after_forward": False}
        found.append(_fsdp2({**usual, **config}))
    elif data == "ddp":
        found += _replicated(config)[1]
    return mesh, tuple(found)


def _megatron(config: Mapping[str, Any]) -> _Parallel:
    options = {key: config[key] for key in _MEGATRON if key in config}
    return Mesh(dp_shard=_ranks(config)), (MegatronDistributedOptimizer(**options),)


_MEGATRON = {"use_distributed_optimizer", "grad_reduce_in_fp32", "overlap_grad_reduce", "bucket_size"}
_MEGATRON |= {"pad_buckets_for_high_nccl_busbw"}
_FSDP1 = {"sharding", "param_dtype", "reduce_dtype", "backward_prefetch", "forward_prefetch", "use_orig_params", "wrap"}
_FSDP1 |= {"sync_every", "replicate", "keep_low_precision_grads"}
_FSDP2 = {"reshard_after_forward", "root_raf", "param_dtype", "reduce_dtype", "wrap", "explicit_prefetch"}
_FSDP2 |= {"sync_every", "cpu_offload", "replicate"}
_DDP = {"gradient_as_bucket_view", "bucket_cap_mb", "static_graph"}
_PIPELINE = {"pp", "microbatches", "schedule", "stage", "virtual", "return_outputs", "cuts", "dp", "data", "tp", "sp"}
_PIPELINE |= {"param_dtype", "reduce_dtype", "wrap", "reshard_after_forward", "replicate"} | _DDP
#: Kind of a case -> the options it takes, and what makes mesh and strategies of them.
_KINDS: dict[str, tuple[set[str], Callable[[Mapping[str, Any]], _Parallel]]] = {
    "single": (set(), _single),
    "ddp": (_DDP, _replicated),
    "zero1": (_DDP | {"parameters_as_bucket_view"}, _optimizer_sharded),
    "fsdp1": (_FSDP1, _flat_sharded),
    "fsdp2": (_FSDP2, _fully_sharded),
    "megatron": (_MEGATRON, _megatron),
    "pp": (_PIPELINE, _pipelined),
    "hsdp": (_FSDP2, _fully_sharded),
    "tp": (_FSDP2 | {"tp", "sp", "loss_parallel"}, _tensor_parallel),
}


def role_errors(line: Mapping[str, Any], peak: StepPeak) -> dict[str, float]:
    """By compared role: (simulated - recorded) / recorded at the steady peak, in percent; 512 B are no error."""
    recorded = Counter(line.get("peak_by_category") or {})
    errors: dict[str, float] = {}
    if not recorded:
        return errors
    for name, (roles, categories) in COMPARED.items():
        expected = sum(recorded[category] for category in categories)
        found = sum(peak.by_role.get(role, 0) for role in roles)
        if abs(found - expected) > 512:
            errors[name] = 100 * (found - expected) / expected if expected else 100.0
        elif expected:
            errors[name] = 0.0
    return errors
