"""From the words of the command line to a workload; the same names serve sweeps and config files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import attrs

from hardware.dtypes import BF16, FP16, FP32, DType
from hardware.errors import UnsupportedError, UsageError, unknown_name
from hardware.units import parse
from simulator.families import families
from simulator.liger import KERNELS, Liger, default_kernels, liger
from simulator.mesh import Mesh
from simulator.model import ModelSpec
from simulator.plan import Strategy
from simulator.workload import LARGEST_ACCUMULATION, Training
from strategies.compilation import CompileLayers
from strategies.float8 import Float8
from strategies.freezing import Freezing
from strategies.interval_checkpointing import IntervalCheckpointing
from studies.chosen import NEWEST_TORCH, Chosen, dotted
from studies.optimizer_options import assume_grad_scaler
from studies.optimizer_options import parse_optimizer as parse_optimizer
from studies.parallelism import Degrees, parallelise, parse_strategy
from studies.pipelines import AnyPipeline, pipeline_of
from studies.pruning import parse_prunings

#: ``--dtype``: element types of the weights and of autocast.
DTYPES: dict[str, tuple[DType, DType | None]] = {
    "fp32": (FP32, None),
    "bf16": (BF16, None),
    "fp16": (FP16, None),
    "amp-bf16": (FP32, BF16),
    "amp-fp16": (FP32, FP16),
}
#: ``--task``: both train every parameter; they differ in data, not in memory.
TASKS = ("full", "pretrain")
#: Tasks that exist but that are not modelled yet, so that they are told from slips of the keyboard.
UNMODELLED_TASKS = ("distillation", "dpo", "grpo", "inference", "lora", "ppo", "qlora", "reward")
#: ``--checkpointing``: the strategy that each word stands for.
CHECKPOINTING = {
    "none": None,
    "full": "full_checkpointing",
    "every": "checkpoint_every",
    "block": "checkpoint_block",
    "uniform": "checkpoint_uniform",
    "selective": "checkpoint_attention",
    "modules": "checkpoint_modules",
    "ops": "checkpoint_ops",
}
_PERCENTAGE = re.compile(r"([0-9]{1,2}(?:\.[0-9]{1,9})?)\s*%")
#: ``2.13``, or all that `torch.__version__` says, such as ``2.6.0+cu124``.
_TORCH_VERSION = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})(?:[.+a-z].{0,40})?")


@attrs.frozen(kw_only=True)
class TrainingOptions:
    """The options of ``vramsim estimate`` as they are typed; None is what the user left out."""

    framework: str | None = None
    """Whose defaults take the place of those left out (`studies.frameworks`)."""
    task: str | None = None
    dtype: str | None = None
    optimizer: str | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    gradient_accumulation: int | None = None
    seq_len: int | None = None
    attention: str | None = None
    sdpa_backend: str | None = None
    padding: str | None = None
    experts: str | None = None
    expert_imbalance: float | None = None
    capacity_factor: float | None = None
    checkpointing: str | None = None
    """``NAME[,option=value...]`` with a name of `CHECKPOINTING`."""
    checkpoint_every: int | None = None
    freeze: str | None = None
    """``layers=N``, ``embeddings``, and modules, names or patterns of weights, joined by commas."""
    clip: float | None = None
    zero_grad: str | None = None
    keep_outputs: bool = False
    keep_inputs: bool | None = None
    grad_scaler: bool | None = None
    optimizer_in_backward: bool = False
    torch: str | None = None
    implementation: str | None = None
    loss: str | None = None
    liger: bool = False
    """What ``use_liger_kernel`` of transformers' Trainer patches."""
    liger_kernels: str | None = None
    """``KERNEL[,...]``: these of Liger's and no others."""
    multiprocessors: int | None = None
    """Of the GPU; the backward of Liger's norm allocates by them."""
    items_in_batch: bool | None = None
    mtp: str | None = None
    """How many modules that predict further tokens are trained; ``config`` for as many as the model's config has."""
    float8: str | None = None
    compile: str | None = None
    prune: Sequence[str] = ()
    """Each ``STRUCTURE=AMOUNT[@LAYERS]``, applied before everything else."""
    strategy: Sequence[str] = ()
    """Each ``NAME[,option=value...]``, applied in order after checkpointing."""
    tp: int | None = None
    pp: int | None = None
    schedule: str | None = None
    virtual_stages: int | None = None
    pp_split: str | None = None
    """Layers of each stage, joined by commas."""
    cp: int | None = None
    cp_comm: str | None = None
    ep: int | None = None
    dp_replicate: int | None = None
    dp_shard: int | None = None


@attrs.frozen
class Resolved:
    """The workload, mesh and strategies that options stand for, and what was assumed for those left out."""

    training: Training
    mesh: Mesh
    strategies: tuple[Strategy, ...]
    """All of them, in order."""
    assumptions: tuple[str, ...]
    prunings: tuple[Strategy, ...] = ()
    """Those at the head of `strategies` that prune the model."""
    pipeline: AnyPipeline | None = None
    """Its first rank; all others are to be simulated as well."""

    def of_rank(self, rank: int) -> tuple[Strategy, ...]:
        """All strategies of a rank of the pipeline, which cuts the model that pruning leaves."""
        assert self.pipeline is not None
        pruned = len(self.prunings)
        return (*self.prunings, attrs.evolve(self.pipeline, rank=rank), *self.strategies[pruned:])


def resolve(options: TrainingOptions, model: ModelSpec, world: int = 1) -> Resolved:
    """The workload of `options` for `model` on `world` GPUs.

    Raises:
        UsageError: an option that is wrong or that clashes with another, in one line.
        UnsupportedError: one that is not modelled.
    """
    torch = _version(dotted(NEWEST_TORCH) if options.torch is None else options.torch)
    options, profiled = _with_framework(options, model, world, torch)
    chosen = Chosen(options, model)
    _check_task(chosen["task"])
    chosen.check_idle()
    weights, autocast = _look_up("dtype", chosen["dtype"], DTYPES)
    degrees = Degrees(**{field.name: getattr(options, field.name) for field in attrs.fields(Degrees)})
    pipeline = pipeline_of(
        options.schedule, options.virtual_stages, options.pp_split, options.pp, chosen["implementation"]
    )
    mesh, strategies, assumed = parallelise(options.strategy, degrees, world)
    optimizer = parse_optimizer(chosen["optimizer"])
    scaled, why_scaled = assume_grad_scaler(options, autocast, optimizer, strategies)
    training = Training(
        micro_batch=chosen["micro_batch"],
        seq_len=_sequence(chosen["seq_len"], model),
        gradient_accumulation=_accumulation(options, chosen, mesh.dp),
        weights=weights,
        autocast=autocast,
        optimizer=optimizer,
        attention=chosen["attention"],
        sdpa_backend=chosen["sdpa_backend"],
        attention_mask=chosen["padding"],
        experts=chosen["experts"],
        expert_imbalance=chosen["expert_imbalance"],
        capacity_factor=options.capacity_factor,
        keep_outputs=options.keep_outputs,
        keep_inputs=bool(options.keep_inputs),
        grad_scaler=scaled,
        optimizer_in_backward=options.optimizer_in_backward,
        clip=options.clip,
        zero_grad=chosen["zero_grad"],
        torch=torch,
        implementation=chosen["implementation"],
        loss=chosen["loss"],
        liger=_liger(options, model.family),
        items_in_batch=bool(options.items_in_batch),
        mtp=_predictors(options.mtp, model),
    )
    prunings = parse_prunings(options.prune)
    low = (Float8(recipe=str(options.float8)),) if options.float8 not in (None, "none") else ()
    compiled = _compiled(options.compile)
    regimes = (*low, *compiled, *_checkpointing(options, chosen["checkpointing"]), *_freezing(options.freeze))
    assumptions = (*profiled, *chosen.assumed(training), *why_scaled, *assumed, *model.assumptions)
    return Resolved(training, mesh, (*prunings, *regimes, *strategies), assumptions, prunings, pipeline)


def _with_framework(
    options: TrainingOptions, model: ModelSpec, world: int, torch: tuple[int, int]
) -> tuple[TrainingOptions, tuple[str, ...]]:
    """`options` with the defaults of their framework, and a line for each."""
    if options.framework is None:
        return options, ()
    from studies.frameworks import with_framework  # it shares a table with the validation of measured runs

    return with_framework(options, model, world, torch)


def _predictors(given: str | None, model: ModelSpec) -> int:
    """How many modules that predict further tokens ``--mtp`` asks for."""
    if given == "config":
        if not model.predictors:
            raise UsageError("'mtp' config: this config names no modules that predict further tokens; give a number")
        return model.predictors
    if given is not None and not given.isdecimal():
        raise UsageError(f"'mtp' must be config or a whole number, not {given!r}")
    return int(given or 0)


def _look_up(field: str, name: str, table: dict[str, Any]) -> Any:
    if name not in table:
        raise unknown_name(field, name, table)
    return table[name]


def _check_task(task: str) -> None:
    if task in UNMODELLED_TASKS:
        raise UnsupportedError(f"'task' {task} is not modelled yet; modelled: {', '.join(TASKS)}")
    if task not in TASKS:
        raise unknown_name("task", task, (*TASKS, *UNMODELLED_TASKS))


def _sequence(length: int, model: ModelSpec) -> int:
    """Learned positions end where their table ends; rotary ones only get worse."""
    if families.get(model.family).bounded_positions and length > model.max_positions:
        raise UsageError(f"'seq-len' must be at most the model's {model.max_positions} positions: {length}; shorten it")
    return length


def _accumulation(options: TrainingOptions, chosen: Chosen, ranks: int) -> int:
    """Micro-batches of each of the data-parallel `ranks` per optimizer step."""
    if options.global_batch is None:
        return 1 if options.gradient_accumulation is None else options.gradient_accumulation
    if options.gradient_accumulation is not None:
        raise UsageError("'global-batch' and 'gradient-accumulation' say the same thing: give one of the two")
    micro_batch: int = chosen["micro_batch"]
    each = micro_batch * ranks
    if options.global_batch < 1 or micro_batch < 1 or options.global_batch % each:
        where = f"x {ranks} data-parallel ranks = {each}" if ranks > 1 else "on one device"
        raise UsageError(
            f"'global-batch' must be a multiple of 'micro-batch' {micro_batch} {where}: {options.global_batch}"
        )
    accumulation = options.global_batch // each
    if accumulation > LARGEST_ACCUMULATION:
        most = f"{LARGEST_ACCUMULATION} micro-batches of {each}"
        raise UsageError(f"'global-batch' must be at most {most}: {options.global_batch}")
    return accumulation


def _version(text: str) -> tuple[int, int]:
    match = _TORCH_VERSION.fullmatch(text)
    if match is None:
        raise UsageError(f"'torch' must be a version such as 2.13: {text!r}")
    version = int(match[1]), int(match[2])
    if not (2, 1) <= version <= (2, 99):
        raise UsageError(f"'torch' must be a version 2.x from 2.1 on: {text!r}")
    return version


def _checkpointing(options: TrainingOptions, text: str) -> tuple[Strategy, ...]:
    """The strategy of ``--checkpointing`` or ``--checkpoint-every``, whose layers are those of ``every,n=...``."""
    if options.checkpoint_every is not None:
        if options.checkpointing is not None:
            raise UsageError("'checkpoint-every' and 'checkpointing' say the same thing: give one of the two")
        if options.checkpoint_every < 1:
            raise UsageError(f"'checkpoint-every' must be a whole number from 1 on: {options.checkpoint_every}")
        return (IntervalCheckpointing(n=options.checkpoint_every),)
    word, comma, settings = text.partition(",")
    name = _look_up("checkpointing", word, CHECKPOINTING)
    if name is None and comma:
        raise UsageError(f"'checkpointing' none has no options: {settings!r}; leave them out")
    return (parse_strategy(f"{name}{comma}{settings}"),) if name else ()


def _compiled(what: str | None) -> tuple[Strategy, ...]:
    """``--compile``: each layer by itself; the whole model as one graph fuses its loss, too."""
    if what == "model":
        raise UnsupportedError("'compile' model is not modelled yet; use layers")
    if what not in (None, "none", "layers"):
        raise unknown_name("compile", what, ("layers", "none"))
    return (CompileLayers(),) if what == "layers" else ()


def _freezing(text: str | None) -> tuple[Strategy, ...]:
    """The strategy of ``--freeze``: which weights are not trained."""
    if text is None:
        return ()
    words = text.split(",")
    layers = [word.removeprefix("layers=") for word in words if word.startswith("layers=")]
    if "" in words or len(layers) > 1 or not all(map(str.isdecimal, layers)):
        raise UsageError(f"'freeze' must be layers=N, 'embeddings' and names of weights, joined by commas: {text!r}")
    named = [word for word in words if word != "embeddings" and not word.startswith("layers=")]
    return (Freezing(layers=int(*layers), embeddings="embeddings" in words, weights="+".join(named)),)


def _liger(options: TrainingOptions, family: str) -> Liger:
    if options.liger and options.liger_kernels is not None:
        raise UsageError("'liger' switches the usual kernels on, 'liger_kernels' those it names: give one of the two")
    names = default_kernels(family) if options.liger else _kernel_names(options.liger_kernels)
    if options.multiprocessors is None:
        return liger(names)
    if "rms_norm" not in names:
        raise UsageError("'multiprocessors' matter to Liger's rms_norm alone: switch it on, or leave them out")
    return liger(names, multiprocessors=options.multiprocessors)


def _kernel_names(text: str | None) -> tuple[str, ...]:
    names = () if text is None else tuple(text.split(","))
    if "" in names:
        raise UsageError(f"'liger_kernels' must name some of {', '.join(KERNELS)}: {text!r}")
    if len(set(names)) < len(names):
        raise UsageError(f"'liger_kernels' must name each once: {text!r}")
    return names


def parse_headroom(text: str, capacity: int) -> int:
    """Bytes of ``--min-headroom``: a share of the capacity (``5%``) or an amount (``2GiB``)."""
    match = _PERCENTAGE.fullmatch(text)
    if match:
        return int(capacity * Decimal(match[1]) / 100)
    try:
        return 0 if text == "0" else parse("min-headroom", text)
    except UsageError:
        rule = "a percentage from 0% to below 100%, or bytes with their unit such as 2GiB"
        raise UsageError(f"'min-headroom' must be {rule}: {text!r}") from None
