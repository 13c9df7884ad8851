"""``vramsim estimate``: the peak of one training step, what it is made of, and whether it fits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from studies.cli.output import Table, show, show_json, size

if TYPE_CHECKING:
    from pathlib import Path

    from simulator.host import HostMemory
    from studies.estimate import Estimate
    from studies.options import TrainingOptions

#: Storages listed one by one.
MOST_STORAGES = 8
#: What makes a storage's name unique, and means nothing to a reader.
_NUMBERED = re.compile(r"(\.default)?(\.[0-9]+)?$")

Text = str | None
Number = int | None


def command(
    model: Annotated[str, typer.Argument(help="Preset name, path to a config.json or its folder, or - for stdin.")],
    gpus: Annotated[str, typer.Option(help="[COUNTx]NAME (see vramsim gpus), or a capacity such as 8x24GiB.")],
    framework: Annotated[
        Text,
        typer.Option(help="Whose defaults hold for options left out (see vramsim frameworks): hf, torchtitan, ..."),
    ] = None,
    task: Annotated[Text, typer.Option(help="full or pretrain.")] = None,
    dtype: Annotated[
        Text, typer.Option(help="fp32, bf16, fp16, amp-bf16 or amp-fp16 (autocast, fp32 weights).")
    ] = None,
    optimizer: Annotated[Text, typer.Option(help="NAME[,option=value...], e.g. adamw,implementation=fused.")] = None,
    micro_batch: Annotated[Number, typer.Option(help="Sequences per forward pass.")] = None,
    global_batch: Annotated[Number, typer.Option(help="Sequences per optimizer step.")] = None,
    gradient_accumulation: Annotated[Number, typer.Option(help="Micro-batches per optimizer step.")] = None,
    seq_len: Annotated[Number, typer.Option(help="Tokens per sequence.")] = None,
    attention: Annotated[Text, typer.Option(help="eager, sdpa, flash_attention_2 or flex_attention.")] = None,
    sdpa_backend: Annotated[Text, typer.Option(help="auto, flash, efficient or math.")] = None,
    padding: Annotated[Text, typer.Option(help="Attention mask: none, full (nothing padded) or padded.")] = None,
    experts: Annotated[
        Text, typer.Option(help="How experts are run (experts_implementation): grouped_mm, batched_mm or eager.")
    ] = None,
    expert_imbalance: Annotated[
        float | None,
        typer.Option(help="Tokens of the busiest expert over the mean, run eagerly; in Megatron of the busiest rank."),
    ] = None,
    capacity_factor: Annotated[
        float | None, typer.Option(help="Room of experts over the mean, in Megatron: tokens are dropped and padded.")
    ] = None,
    checkpointing: Annotated[
        Text, typer.Option(help="Activation checkpointing: none, or NAME[,option=value...] with full, every, ...")
    ] = None,
    checkpoint_every: Annotated[Number, typer.Option(help="Checkpoint every n-th layer: every,n=...")] = None,
    freeze: Annotated[
        Text,
        typer.Option(help="Weights that are not trained: layers=N, embeddings, a module, name or pattern; by commas."),
    ] = None,
    clip: Annotated[float | None, typer.Option(help="Largest global norm of the gradients.")] = None,
    zero_grad: Annotated[Text, typer.Option(help="none (set_to_none=True) or zero.")] = None,
    keep_outputs: Annotated[
        bool, typer.Option("--keep-outputs", help="The outputs are held through backward.")
    ] = False,
    keep_inputs: Annotated[
        bool | None,
        typer.Option("--keep-inputs/--no-keep-inputs", help="The loop holds its batch through the optimizer's step."),
    ] = None,
    grad_scaler: Annotated[
        bool | None,
        typer.Option("--grad-scaler/--no-grad-scaler", help="torch.amp.GradScaler; by default with amp-fp16."),
    ] = None,
    optimizer_in_backward: Annotated[
        bool, typer.Option("--optimizer-in-backward", help="Each weight is updated as soon as its gradient is there.")
    ] = False,
    torch: Annotated[Text, typer.Option(help="PyTorch version whose behaviour is simulated.")] = None,
    implementation: Annotated[
        Text,
        typer.Option(
            help="Whose code: transformers, torchtitan, torchtune, plain (nn.Module), megatron or megatron_te."
        ),
    ] = None,
    loss: Annotated[
        Text, typer.Option(help="default, te_fused (megatron), chunked or chunked_compiled (torchtune).")
    ] = None,
    liger: Annotated[
        bool, typer.Option("--liger", help="Fused kernels of Liger-Kernel, as transformers' use_liger_kernel.")
    ] = False,
    liger_kernels: Annotated[
        Text, typer.Option(help="Some of them: KERNEL[,...], for instance rms_norm,fused_linear_cross_entropy.")
    ] = None,
    multiprocessors: Annotated[
        int | None, typer.Option(help="Streaming multiprocessors of the GPU, for Liger's rms_norm.")
    ] = None,
    mtp: Annotated[
        Text, typer.Option(help="Modules that predict further tokens (multi-token prediction): a number, or config.")
    ] = None,
    items_in_batch: Annotated[
        bool | None,
        typer.Option(
            "--items-in-batch/--no-items-in-batch", help="num_items_in_batch is passed, as transformers' Trainer does."
        ),
    ] = None,
    float8: Annotated[
        Text, typer.Option(help="Linear layers on float8 copies, scaled tensorwise or rowwise (torchao, eager).")
    ] = None,
    compile_: Annotated[
        Text, typer.Option("--compile", help="none, or layers: torch.compile of each layer, approximately.")
    ] = None,
    prune: Annotated[
        list[str] | None,
        typer.Option(
            help="STRUCTURE=AMOUNT[@LAYERS]: heads, groups, channels or experts, e.g. heads=4, channels=25%@0,4-7; "
            "hidden=25%; or layers=2,5-7. May be repeated."
        ),
    ] = None,
    strategy: Annotated[
        list[str] | None, typer.Option(help="NAME[,option=value...] (see vramsim strategies); may be repeated.")
    ] = None,
    tp: Annotated[Number, typer.Option(help="Tensor-parallel degree.")] = None,
    pp: Annotated[Number, typer.Option(help="Ranks of the pipeline (torch.distributed.pipelining).")] = None,
    schedule: Annotated[
        Text, typer.Option(help="Of the pipeline: gpipe, 1f1b, interleaved_1f1b, zb_h1, zbv or dualpipev.")
    ] = None,
    virtual_stages: Annotated[
        Number, typer.Option(help="Stages of each rank (interleaved_1f1b, zb_h1): 2 unless given.")
    ] = None,
    pp_split: Annotated[Text, typer.Option(help="Layers of each stage, e.g. 7,8,8,7; else torchtitan's split.")] = None,
    cp: Annotated[Number, typer.Option(help="Context-parallel degree.")] = None,
    cp_comm: Annotated[Text, typer.Option(help="What ranks along cp exchange: p2p, a2a or all_gather.")] = None,
    ep: Annotated[Number, typer.Option(help="Expert-parallel degree.")] = None,
    dp_replicate: Annotated[Number, typer.Option(help="Data-parallel replicas (HSDP, DDP); else what is left.")] = None,
    dp_shard: Annotated[Number, typer.Option(help="Data-parallel shards; else what is left.")] = None,
    min_headroom: Annotated[str, typer.Option(help="Least room to leave, e.g. 5% or 2GiB.")] = "0",
    plot: Annotated[Text, typer.Option(help="Draw the live-memory timeline to this .png, .svg or .pdf.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --plot overwrite a file.")] = False,
    no_rules_of_thumb: Annotated[
        bool, typer.Option("--no-rules-of-thumb", help="Leave out of the text what rules of thumb say.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 5 where something is not modelled.")] = False,
) -> int:
    """Estimate the GPU memory of one training step on every rank."""
    given = {**locals(), "compile": compile_, "prune": tuple(prune or ()), "strategy": tuple(strategy or ())}
    del strict  # the entry point reads it: it only changes an exit code
    from studies.options import TrainingOptions
    from studies.plots import check_target

    target = check_target(plot, force=force) if plot is not None else None
    options = TrainingOptions(**{field.name: given[field.name] for field in attrs.fields(TrainingOptions)})
    return _run(model, gpus, options, min_headroom, target, json=json, rules=not no_rules_of_thumb)


def _run(
    model: str, gpus: str, options: TrainingOptions, min_headroom: str, target: Path | None, *, json: bool, rules: bool
) -> int:
    """Simulate, draw, print; returns the exit code."""
    from simulator.reading import read_model
    from studies.estimate import estimate

    result = estimate(read_model(model), gpus, options, min_headroom)
    if target is not None:
        from studies.plots import save_timeline

        save_timeline(result, target)
    if json:
        show_json(result.to_json_dict())
    else:
        show(tables(result, rules=rules))
    return result.verdict.exit_code


def tables(result: Estimate, *, rules: bool = True) -> list[Table]:
    """The estimate as tables of text; with `rules` of thumb, too."""
    several = [_by_rank(result)] if result.cluster.count > 1 else []
    pruned = [_pruning(result)] if result.savings else []
    parts = [_summary(result), *pruned, *several, _by_role(result), _by_layer(result), _largest(result)]
    return [*parts, *([_rules_of_thumb(result)] if rules else []), _assumptions(result)]


def _summary(result: Estimate) -> Table:
    from hardware.units import both, gib
    from studies.estimate import METRIC, METRIC_NOTE

    capacity, report = result.cluster.gpu.capacity, result.report
    span = both(capacity.low) if capacity.low == capacity.high else f"{gib(capacity.low)} to {gib(capacity.high)}"
    rows = [
        ("peak per GPU", f"{both(result.peak.nbytes)} {METRIC}"),
        ("", METRIC_NOTE),
        ("capacity", f"{span} ({result.cluster.gpu.name}; {capacity.evidence})"),
        ("headroom", both(result.headroom)),
        *_host(report.host, "per rank"),
        *(_host(result.host_of_node, f"per node of {node} GPUs") if (node := result.cluster.node_gpus) > 1 else []),
        ("verdict", result.verdict.text),
        *([("highest rank", _highest(result))] if result.pipeline is not None else []),
        ("where", _where(result)),
        ("cold step", f"{gib(report.cold.nbytes)}, in {report.cold.phase.value}"),
        ("steady step", f"{gib(report.steady.nbytes)}, in {report.steady.phase.value}"),
        ("model", f"{report.model.name}: {report.parameters:,} parameters, {report.whole_model.depth} layers"),
        *([("", f"{report.predictor_parameters:,} of them for further tokens")] if report.predictor_parameters else []),
        ("workload", result.workload),
        *_routing(result),
    ]
    return Table(f"{report.model.name} on {result.cluster}", rows)


def _highest(result: Estimate) -> str:
    stages = result.ranks[0].stages
    assert stages is not None
    plural = "s" if len(stages.stages) > 1 else ""
    names = ", ".join(map(str, stages.stages))
    return f"{stages.rank} of {result.report.plan.mesh.pp} (stage{plural} {names}, {stages.layer_count} layers)"


def _host(host: HostMemory, where: str) -> list[tuple[str, str]]:
    """What each rank, or all ranks of a node, keep beside their devices."""
    from hardware.units import both, gib

    rows = [(f"host, {where}", f"{both(host.nbytes)}, of which {gib(host.pinned)} pinned")] if host.nbytes else []
    return [*rows, (f"NVMe, {where}", both(host.nvme))] if host.nvme else rows


def _routing(result: Estimate) -> list[tuple[str, str]]:
    """How far the peak depends on which experts tokens go to, where it does."""
    if result.routing is None:
        return []
    band = result.routing
    worst = f"{size(band.worst)} with {band.imbalance:g} times the mean at {band.busiest} in each layer"
    return [("routing", f"{size(band.even)} with even routing to {worst}")]


def _pruning(result: Estimate) -> Table:
    rows = []
    for each in result.savings:
        text = [size(n) if each.is_bytes else f"{n:,}" for n in (each.before, each.after, each.saved)]
        rows.append((each.name, *text, f"{100 * each.saved / each.before:.1f} %" if each.before else ""))
    header = ("", "before", "after", "saved", "share")
    return Table("what pruning saves (bytes of each kind: the most at any time)", rows, header, frozenset({1, 2, 3, 4}))


def _where(result: Estimate) -> str:
    peak, layer = result.peak, result.report.layer_of()
    place = f", layer {layer}" if layer is not None else ""
    module = f", module {peak.module}" if peak.module else ""
    return f"{peak.step} step, {peak.phase.value}{place}{module}, op {peak.op}"


def _by_rank(result: Estimate) -> Table:
    if result.pipeline is not None:
        return _by_pipeline_rank(result)
    rows, left = [], result.cluster.count
    for each in result.ranks:
        peak, left = each.report.peak, left - each.ranks.count
        between = size(each.report.steady.start_bytes)
        rows.append((each.ranks.name, str(each.ranks.count), size(peak.nbytes), peak.phase.value, between))
    if left:
        rows.append(("the others, between these", str(left), "", "", ""))
    header = ("ranks", "count", "peak", "in", "between steps")
    return Table("by rank", rows, header, right=frozenset({1, 2, 4}))


def _by_pipeline_rank(result: Estimate) -> Table:
    rows = []
    for each in sorted(result.ranks, key=lambda each: each.stages.rank if each.stages else 0):
        peak, stages = each.report.peak, each.stages
        assert stages is not None
        names = ", ".join(map(str, stages.stages))
        layers = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in stages.layers)
        held = str(stages.in_flight.whole)
        between = size(each.report.steady.start_bytes)
        worst = "highest" if each is result.ranks[0] else ""
        rows.append((str(stages.rank), names, layers, held, size(peak.nbytes), peak.phase.value, between, worst))
    header = ("rank", "stages", "layers", "in flight", "peak", "in", "between steps", "")
    each_rank = result.ranks[0].ranks.count
    alike = f"; each stands for {each_rank} GPUs" if each_rank > 1 else ""
    title = f"by rank of the pipeline (in flight: most micro-batches held at once, for each stage{alike})"
    return Table(title, rows, header, right=frozenset({0, 3, 4, 6}))


def _by_role(result: Estimate) -> Table:
    roles = sorted(result.peak.by_role.items(), key=lambda item: -item[1])
    rows = [(role.value, size(nbytes), _share(nbytes, result)) for role, nbytes in roles]
    return Table("at the peak, by role", rows, right=frozenset({1, 2}))


def _by_layer(result: Estimate) -> Table:
    rows = []
    for group in result.layers:
        each = f"{group.count} x {size(group.nbytes_each)}" if group.count > 1 else ""
        rows.append((group.name, each, size(group.nbytes), _share(group.nbytes, result)))
    return Table("at the peak, by layer", rows, right=frozenset({1, 2, 3}))


def _share(nbytes: int, result: Estimate) -> str:
    return f"{100 * nbytes / result.peak.nbytes:.1f} %"


def _largest(result: Estimate) -> Table:
    rows = []
    for live in result.live[:MOST_STORAGES]:
        label, layer = live.identity
        where = "" if layer is None else f"layer {layer}"
        name = _NUMBERED.sub("", label).removeprefix(".")
        rows.append((name, where, live.storage.dtype.name, live.storage.role.value, size(live.nbytes)))
    return Table("at the peak, largest storages", rows, right=frozenset({4}))


def _rules_of_thumb(result: Estimate) -> Table:
    rows = [
        (rule.name, rule.of, size(rule.says_bytes), size(rule.simulated_bytes), rule.why)
        for rule in result.rules_of_thumb
    ]
    header = ("rule", "of", "says", "at the peak", "why they differ")
    return Table("rules of thumb", rows, header, right=frozenset({2, 3}))


def _assumptions(result: Estimate) -> Table:
    return Table("defaults and assumptions, because not given", [(line,) for line in result.assumptions])
