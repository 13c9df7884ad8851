"""Ranks of Megatron-LM's pipelines as the distributed oracle records them: kind ``megatron_pp``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hardware.dtypes import dtype
from hardware.errors import UnsupportedError, UsageError
from simulator.mesh import Mesh
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.plan import Strategy
from simulator.workload import Optimizer, Training
from strategies.megatron import MegatronDistributedOptimizer
from strategies.megatron_pipeline import MegatronPipeline
from strategies.tensor_parallel import TensorParallel

#: The recorder's names of optimizers -> torch's implementation of AdamW.
_OPTIMIZERS = {"adamw_foreach": "foreach", "adamw_loop": "for-loop"}
#: Options of the pipeline and of the optimizer around it, by the recorder's names.
_PIPELINE = {"stage": "rank", "virtual": "chunks", "group": "group"}
_PIPELINE |= {name: name for name in ("overlap_p2p_comm", "deallocate_pipeline_outputs")}
_OPTIMIZER = ("overlap_grad_reduce", "bucket_size", "grad_reduce_in_fp32")
_KNOWN = {"kind", "family", "shape", "dtype", "batch", "seq", "pp", "tp", "sp", "dp", "rank", "microbatches", "optim"}
_KNOWN |= {*_PIPELINE, *_OPTIMIZER}
_FAMILIES = ("llama", "gpt2")


def recorded_megatron(config: Mapping[str, Any]) -> tuple[ModelSpec, Training, tuple[Strategy, ...], Mesh, int]:
    """Model, workload, strategies, mesh and data-parallel rank of a recorded pipeline rank.

    ``shape`` is layers, hidden, feed-forward width, heads, key heads, vocabulary and whether embeddings are tied.

    Raises:
        UnsupportedError: an option that is not known.
        UsageError: one that lacks.
    """
    unknown = sorted(set(config) - _KNOWN)
    if unknown:
        raise UnsupportedError(f"case option {unknown[0]!r} is not known for kind megatron_pp")
    try:
        mesh = Mesh(pp=config["pp"], dp_shard=config.get("dp", 1), tp=config.get("tp", 1))
        return _model(config), _training(config), _strategies(config, mesh), mesh, config.get("rank", 0)
    except KeyError as error:
        raise UsageError(f"a case of kind megatron_pp needs {error}") from None


def _model(config: Mapping[str, Any]) -> ModelSpec:
    if config["family"] not in _FAMILIES:
        raise UnsupportedError(f"family {config['family']!r} is not simulated, only {', '.join(_FAMILIES)}")
    layers, hidden, width, heads, key_heads, vocab, tied = config["shape"]
    gpt = config["family"] == "gpt2"
    attention = AttentionSpec(heads, key_heads, hidden // heads, bias=gpt)
    feed_forward = FeedForwardSpec(width, "gelu" if gpt else "silu", gated=not gpt, bias=gpt)
    dropout = 0.1 if gpt else 0.0
    return ModelSpec(
        name="recorded",
        family=config["family"],
        hidden=hidden,
        vocab=vocab,
        max_positions=config["seq"],
        layers=(LayerSpec(attention, feed_forward),) * layers,
        tied_embeddings=tied,
        embedding_dropout=dropout,
        residual_dropout=dropout,
    )


def _training(config: Mapping[str, Any]) -> Training:
    optimizer = config.get("optim", "adamw_foreach")
    if optimizer not in _OPTIMIZERS:
        raise UnsupportedError(f"optim {optimizer!r} is not simulated, only {', '.join(_OPTIMIZERS)}")
    return Training(
        micro_batch=config["batch"],
        seq_len=config["seq"],
        gradient_accumulation=config["microbatches"],
        weights=dtype(config["dtype"]),
        optimizer=Optimizer(name="adamw", implementation=_OPTIMIZERS[optimizer]),
        implementation="megatron",
        sdpa_backend="flash",
        any_sdpa_backend=True,
        # a CPU build of torch, which cannot see inside kernels
        fused_activation_backward=False,
        fused_norm=False,
        kernel_workspace=False,
    )


def _strategies(config: Mapping[str, Any], mesh: Mesh) -> tuple[Strategy, ...]:
    pipeline = MegatronPipeline(**{option: config[name] for name, option in _PIPELINE.items() if name in config})
    shards = (TensorParallel(sequence_parallel=bool(config.get("sp"))),) if mesh.tp > 1 else ()
    options = {name: config[name] for name in _OPTIMIZER if name in config}
    return pipeline, *shards, MegatronDistributedOptimizer(**options)
