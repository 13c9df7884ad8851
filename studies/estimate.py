"""The question of ``vramsim estimate``: does this training step fit on this GPU, and what fills it?"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import attrs

from hardware.cluster import Cluster, parse_cluster
from simulator.host import HostMemory, fullest_node
from simulator.model import ModelSpec
from simulator.report import Report, StepPeak
from simulator.timeline import Live
from simulator.workload import Training
from studies.breakdown import LayerGroup, by_place
from studies.options import Resolved, TrainingOptions, parse_headroom, resolve
from studies.pipelines import AnyPipeline, StagesOfRank, assumed
from studies.pruning import Saving, savings
from studies.ranks import SimulatedRanks, simulate_ranks
from studies.routing import RoutingBand, routing_band
from studies.rules_of_thumb import RuleOfThumb, rules_of_thumb

SCHEMA_VERSION = 1
METRIC = "allocated"
METRIC_NOTE = (
    "live tensors, each rounded up to 512 B; the CUDA context, library workspaces and fragmentation come on top"
)


class Verdict(enum.Enum):
    """What the peak means for the GPU, with its exit code."""

    FITS = ("fits", 0)
    DOES_NOT_FIT = ("does not fit", 3)
    TOO_LITTLE_HEADROOM = ("fits, but with less headroom than asked for", 4)
    UNCERTAIN = ("fits only if the capacity is at the high end of its sources", 4)

    def __init__(self, text: str, exit_code: int) -> None:
        self.text = text
        self.exit_code = exit_code


class Estimate:
    """The reports of a job's ranks held against a GPU; the rank with the highest peak speaks for all."""

    def __init__(
        self,
        ranks: Sequence[SimulatedRanks],
        cluster: Cluster,
        min_headroom: int,
        assumptions: tuple[str, ...],
        savings: Sequence[Saving] = (),
        routing: RoutingBand | None = None,
        pipeline: AnyPipeline | None = None,
    ) -> None:
        self.ranks = tuple(ranks)
        self.report = ranks[0].report
        self.cluster = cluster
        self.min_headroom = min_headroom
        self.assumptions = assumptions
        self.savings = tuple(savings)
        self.routing = routing
        self.pipeline = pipeline

    @property
    def peak(self) -> StepPeak:
        """The higher of the two steps' peaks."""
        return self.report.peak

    @property
    def headroom(self) -> int:
        """Bytes left at the peak on a card at the low end of the capacity's range; negative when it does not fit."""
        return self.cluster.gpu.capacity.low - self.peak.nbytes

    @property
    def verdict(self) -> Verdict:
        """Whether it fits."""
        capacity = self.cluster.gpu.capacity
        if self.peak.nbytes > capacity.high:
            return Verdict.DOES_NOT_FIT
        if self.headroom < 0:
            return Verdict.UNCERTAIN
        return Verdict.TOO_LITTLE_HEADROOM if self.headroom < self.min_headroom else Verdict.FITS

    @property
    def workload(self) -> str:
        """The regime in one line: element types, batch, attention, optimizer, strategies."""
        training = self.report.training
        compute = self.report.plan.compute
        regime = f"autocast {training.autocast}" if training.autocast else str(training.weights)
        regime += f" computed in {compute}" if compute not in (None, training.weights) else ""
        batch = f"micro-batch {training.micro_batch} x {training.seq_len} tokens"
        accumulation = training.gradient_accumulation
        more = f", {accumulation} per step" if accumulation > 1 else ""
        mesh = self.report.plan.mesh
        words = [name.replace("_", " ") for name in self.report.plan.applied]
        if self.pipeline is not None:
            words = [f"pipeline {self.pipeline.known_as}" if word == self.pipeline.name else word for word in words]
        strategies = "".join(f", {word}" for word in words)
        strategies += f" on {mesh}" if mesh.world > 1 else ""
        attends = any(layer.attends for layer in self.report.model.layers)
        how = f"{training.attention} attention, " if attends else ""
        how += f"{training.optimizer.name} ({training.optimizer.implementation})"
        how += " in backward" if training.optimizer_in_backward else ""
        whose = "" if training.implementation == "transformers" else f", {training.implementation}'s code"
        return f"{regime}, {batch}{more}, {how}{whose}{strategies}"

    @cached_property
    def host_of_node(self) -> HostMemory:
        """What the ranks of one node keep beside their devices, at most where ranks differ."""
        ranks = [(each.report.host, each.ranks.count) for each in self.ranks]
        return fullest_node(ranks, self.cluster.node_gpus)

    @cached_property
    def live(self) -> list[Live]:
        """Storages alive at the peak, largest first."""
        return self.report.live()

    @cached_property
    def layers(self) -> list[LayerGroup]:
        """Bytes at the peak by layer, equal neighbours together, and by module outside the layers."""
        return by_place(self.live, self.report.plan.graph)

    @cached_property
    def rules_of_thumb(self) -> list[RuleOfThumb]:
        """What rules of thumb say of this run, beside what was simulated."""
        return rules_of_thumb(self.report, self.live)

    def to_json_dict(self) -> dict[str, Any]:
        """The estimate as plain data; byte counts are ints and say so in their names."""
        capacity = self.cluster.gpu.capacity
        return {
            "schema_version": SCHEMA_VERSION,
            "model": _model_dict(self.report),
            "training": _training_dict(self.report.training),
            "gpu": {
                "name": self.cluster.gpu.name,
                "capacity_low_bytes": capacity.low,
                "capacity_high_bytes": capacity.high,
                "capacity_basis": capacity.basis,
                "capacity_evidence": capacity.evidence,
            },
            "metric": METRIC,
            "metric_note": METRIC_NOTE,
            "peak_bytes": self.peak.nbytes,
            "peak": _step_dict(self.peak, self.report),
            "cold": _step_dict(self.report.cold, self.report),
            "steady": _step_dict(self.report.steady, self.report),
            "host_bytes": self.report.host.nbytes,
            "host_pinned_bytes": self.report.host.pinned,
            "nvme_bytes": self.report.host.nvme,
            "node_gpus": self.cluster.node_gpus,
            "node_host_bytes": self.host_of_node.nbytes,
            "node_host_pinned_bytes": self.host_of_node.pinned,
            "node_nvme_bytes": self.host_of_node.nvme,
            "headroom_bytes": self.headroom,
            "min_headroom_bytes": self.min_headroom,
            "fits": self.verdict in (Verdict.FITS, Verdict.TOO_LITTLE_HEADROOM),
            "verdict": self.verdict.text,
            "exit_code": self.verdict.exit_code,
            "by_layer": [_group_dict(group) for group in self.layers],
            "largest": [_live_dict(live) for live in self.live[:10]],
            "rules_of_thumb": [attrs.asdict(rule) for rule in self.rules_of_thumb],
            "mesh": self.report.plan.mesh.degrees,
            "routing": None if self.routing is None else _routing_dict(self.routing),
            "pruning": [_saving_dict(each) for each in self.savings],
            "pipeline": self._pipeline_dict(),
            "ranks": [_ranks_dict(each) for each in self.ranks],
            "strategies": list(self.report.plan.applied),
            "assumptions": list(self.assumptions),
        }

    def _pipeline_dict(self) -> dict[str, Any] | None:
        if self.pipeline is None:
            return None
        made = self.pipeline.made_for(self.report.plan.mesh.pp, self.report.training.gradient_accumulation)
        ranks = [each.stages for each in self.ranks if each.stages is not None]
        split = dict(pair for stages in ranks for pair in stages.named)
        return {
            "schedule": made.name,
            "virtual_stages": made.chunks,
            "micro_batches": made.micro_batches,
            "layers_of_stages": [len(split[stage]) for stage in sorted(split)],
            "worst_rank": self.ranks[0].stages.rank if self.ranks[0].stages else None,
        }


def estimate(model: ModelSpec, gpus: str, options: TrainingOptions, min_headroom: str = "0") -> Estimate:
    """Simulate `model` under `options` and hold the peak against `gpus`.

    Raises:
        UsageError: an option that is wrong, in one line.
        UnsupportedError: one that is not modelled.
    """
    cluster = parse_cluster(gpus)
    resolved: Resolved = resolve(options, model, cluster.count)
    headroom = parse_headroom(min_headroom, cluster.gpu.capacity.low)
    ranks = simulate_ranks(model, resolved)
    assumptions = (*resolved.assumptions, *ranks[0].report.plan.assumptions, *_of_pipeline(options, resolved, ranks))
    saved = _savings(model, resolved, ranks[0].report)
    return Estimate(ranks, cluster, headroom, assumptions, saved, routing_band(model, resolved), resolved.pipeline)


def _of_pipeline(options: TrainingOptions, resolved: Resolved, ranks: Sequence[SimulatedRanks]) -> list[str]:
    """What was assumed about a pipeline; nothing without one."""
    if resolved.pipeline is None:
        return []
    given = [name for name in ("schedule", "pp_split") if getattr(options, name) is not None]
    split = {number: len(layers) for each in ranks if each.stages for number, layers in each.stages.named}
    tied = ranks[0].report.whole_model.tied_embeddings
    return assumed(resolved.pipeline, given, [split[stage] for stage in sorted(split)], tied=tied)


def _savings(model: ModelSpec, resolved: Resolved, after: Report) -> list[Saving]:
    """What the rank that speaks for all saves by pruning; nothing where nothing is pruned."""
    if not resolved.prunings:
        return []
    unpruned = attrs.evolve(resolved, strategies=resolved.strategies[len(resolved.prunings) :], prunings=())
    return savings(simulate_ranks(model, unpruned)[0].report, after)


def _model_dict(report: Report) -> dict[str, Any]:
    model = report.whole_model
    sizes = {"layers": model.depth, "mtp_modules": len(model.layers) - model.depth}
    sizes |= {"mtp_params": report.predictor_parameters, "hidden": model.hidden, "vocab": model.vocab}
    return {"id": model.name, "family": model.family, "params": report.parameters, **sizes}


def _training_dict(training: Training) -> dict[str, Any]:
    """Every field of the workload that was simulated, given or defaulted."""
    data = attrs.asdict(training, recurse=False)
    data["weights"] = training.weights.name
    data["autocast"] = None if training.autocast is None else training.autocast.name
    data["torch"] = ".".join(map(str, training.torch))
    data["optimizer"] = attrs.asdict(training.optimizer)
    data["liger"] = {"kernels": training.liger.kernels, "multiprocessors": training.liger.multiprocessors}
    return data


def _routing_dict(band: RoutingBand) -> dict[str, Any]:
    return {"even_bytes": band.even, "worst_bytes": band.worst, "imbalance": band.imbalance}


def _saving_dict(each: Saving) -> dict[str, Any]:
    unit = "_bytes" if each.is_bytes else "_count"
    return {"name": each.name, f"before{unit}": each.before, f"after{unit}": each.after, f"saved{unit}": each.saved}


def _ranks_dict(each: SimulatedRanks) -> dict[str, Any]:
    peak = each.report.peak
    return {
        "ranks": each.ranks.name,
        "count": each.ranks.count,
        **({} if each.stages is None else _stages_dict(each.stages)),
        "peak_bytes": peak.nbytes,
        "step": peak.step,
        "phase": peak.phase.value,
        "between_steps_bytes": each.report.steady.start_bytes,
    }


def _stages_dict(stages: StagesOfRank) -> dict[str, Any]:
    return {
        "pipeline_rank": stages.rank,
        "stages": list(stages.stages),
        "layers": [[layers.start, layers.stop - 1] for layers in stages.layers],
        "in_flight": stages.in_flight.whole,
        "in_flight_by_stage": list(stages.in_flight.by_chunk),
        "awaiting_weights": stages.in_flight.awaiting_weights,
    }


def _group_dict(group: LayerGroup) -> dict[str, Any]:
    sizes = {"count": group.count, "each_bytes": group.nbytes_each, "total_bytes": group.nbytes}
    return {"layers": group.name, **sizes}


def _step_dict(step: StepPeak, report: Report) -> dict[str, Any]:
    return {
        "step": step.step,
        "peak_bytes": step.nbytes,
        "phase": step.phase.value,
        "layer": report.layer_of(step),
        "module": step.module,
        "op": step.op,
        "by_role_bytes": {role.value: nbytes for role, nbytes in step.by_role.items()},
        "start_bytes": step.start_bytes,
        "end_bytes": step.end_bytes,
    }


def _live_dict(live: Live) -> dict[str, Any]:
    label, layer = live.identity
    return {
        "name": label,
        "layer": layer,
        "dtype": live.storage.dtype.name,
        "role": live.storage.role.value,
        "allocated_bytes": live.nbytes,
    }
