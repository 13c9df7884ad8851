"""Rules of thumb that people go by, beside what was simulated: what each says of this run, and why the two differ.

These are other people's sums, kept to be compared with; nothing here enters an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs

from hardware.dtypes import FP32, DType
from simulator.model import AttentionSpec
from simulator.report import Report
from simulator.roles import Role
from simulator.timeline import Live

#: Differences below this share of the simulated bytes are called agreement.
AGREEMENT = 0.02
ACTIVATIONS = "activations of layers"
#: What training keeps from step to step, and the gradients.
STATES = (Role.PARAMETER, Role.MASTER_WEIGHT, Role.GRADIENT, Role.BUCKET, Role.OPTIMIZER_STATE)
_WEIGHTS = "Hugging Face, 'Optimizing your LLM in production': 4 GB per billion parameters in fp32, 2 GB in 16 bits"
_ZERO = "ZeRO, arXiv:1910.02054, section 3.1: 2 + 2 + 12 bytes per parameter with Adam in mixed precision"
_ANATOMY = "Hugging Face, 'Model training anatomy': 6 + 8 + 4 bytes per parameter with AdamW in mixed precision"
_PURE = "LLaMA-Factory, README: 8 GB per billion parameters, full fine-tuning in pure bf16"
_ACTIVATIONS = "Korthikanti et al., arXiv:2205.05198, equation 1: s b h (34 + 5 a s / h) bytes per layer"


@attrs.frozen
class RuleOfThumb:
    """One rule of thumb held against one simulation; bytes of one GPU."""

    name: str
    source: str
    of: str
    """What the rule is about, and so which part of the peak it is compared with."""
    says_bytes: int
    simulated_bytes: int
    why: str
    """Why the two differ."""


def rules_of_thumb(report: Report, live: Sequence[Live]) -> list[RuleOfThumb]:
    """Every rule, applied to what `report` is about.

    Args:
        live: the storages alive at the peak.
    """
    weights = report.training.weights.bits // 8
    roles = report.peak.by_role
    states = sum(roles.get(role, 0) for role in STATES)
    layers = sum(each.nbytes for each in live if each.identity[1] is not None and _is_activation(each))
    held = roles.get(Role.PARAMETER, 0)
    per_parameter: list[tuple[str, str, int, Callable[[Report], list[str]]]] = [
        ("16 B per parameter", _ZERO, 16, _not_mixed),
        ("18 B per parameter", _ANATOMY, 18, _not_mixed),
        ("8 GB per billion", _PURE, 8, _not_pure),
    ]
    return [
        _rule(report, f"{weights} GB per billion", _WEIGHTS, "weights", weights * report.parameters, held, []),
        *(
            _rule(report, name, source, "training state", each * report.parameters, states, [*why(report)])
            for name, source, each, why in per_parameter
        ),
        _rule(report, "s b h (34 + 5 a s / h)", _ACTIVATIONS, ACTIVATIONS, *_by_layer(report, layers)),
    ]


def _is_activation(live: Live) -> bool:
    return live.storage.role is Role.ACTIVATION


def _rule(
    report: Report, name: str, source: str, of: str, says: int, simulated: int, reasons: Sequence[str]
) -> RuleOfThumb:
    if abs(says - simulated) <= AGREEMENT * simulated:
        return RuleOfThumb(name, source, of, says, simulated, "they agree")
    missing = _gradients_missing(report) if of == "training state" else []
    found = [*(_whole(report) if of != ACTIVATIONS else []), *reasons, *missing]
    return RuleOfThumb(name, source, of, says, simulated, "; ".join(found) or "this model's code keeps other tensors")


def _whole(report: Report) -> list[str]:
    mesh = report.plan.mesh
    return [f"the rule is of the whole model, this of one rank of {mesh.world} ({mesh})"] if mesh.world > 1 else []


def _not_mixed(report: Report) -> list[str]:
    """Why this is not the training in mixed precision with Adam that a rule counts."""
    training = report.training
    narrow = training.autocast or _computed(report)
    if narrow == FP32:
        regime = ["the rule counts 16-bit copies, here all is fp32"]
    elif training.weights == FP32:
        regime = ["16-bit copies of fp32 weights are temporary here"]
    elif not report.peak.by_role.get(Role.MASTER_WEIGHT):
        regime = [f"the rule counts fp32 copies and states, here all is {training.weights}"]
    else:
        regime = []
    return [*regime, *_not_adam(report)]


def _computed(report: Report) -> DType:
    """The element type of forward and backward, autocast left aside."""
    return report.plan.compute or report.training.weights


def _not_pure(report: Report) -> list[str]:
    training = report.training
    pure = training.weights != FP32 and not report.peak.by_role.get(Role.MASTER_WEIGHT)
    return [*([] if pure else ["the rule has no fp32 weights, gradients or states"]), *_not_adam(report)]


def _not_adam(report: Report) -> list[str]:
    name = report.training.optimizer.name
    return [] if name in ("adam", "adamw") else [f"the rule is for Adam, not {name}"]


def _gradients_missing(report: Report) -> list[str]:
    """Gradients that a rule adds but that do not exist at the peak."""
    roles, peak = report.peak.by_role, report.peak
    there = roles.get(Role.GRADIENT, 0) + roles.get(Role.BUCKET, 0)
    if there >= (1 - AGREEMENT) * roles.get(Role.PARAMETER, 0):
        return []
    return [f"at the peak, in {peak.phase.value}, not all gradients exist"]


def _by_layer(report: Report, simulated: int) -> tuple[int, int, list[str]]:
    """What equation 1 says of all layers, what they hold at the peak, and why that differs."""
    training, model = report.training, report.model
    tokens = training.micro_batch * training.seq_len
    mixers = [layer.token_mixer for layer in model.layers]
    heads = sum(mixer.heads for mixer in mixers if isinstance(mixer, AttentionSpec))
    says = tokens * (34 * model.hidden * len(model.layers) + 5 * heads * training.seq_len)
    fp32 = _computed(report) == FP32
    autocast = training.autocast is not None
    reasons = [
        *([f"the rule is of whole layers, this of tp {report.plan.mesh.tp}"] if report.plan.mesh.tp > 1 else []),
        *(["layers are recomputed"] if report.plan.recomputed else []),
        *(["no matrix of scores is kept"] if training.attention != "eager" else []),
        *(["activations are fp32, not 16-bit"] if fp32 and not autocast else []),
        *(["autocast keeps fp32 beside 16-bit copies"] if autocast else []),
        *(["a gated MLP"] if any(getattr(layer.channel_mixer, "gated", False) for layer in model.layers) else []),
        *(["no dropout"] if not model.residual_dropout else []),
        *(["a rank of a pipeline holds several micro-batches"] if report.plan.pipeline is not None else []),
        *_few_alive(report),
    ]
    return says, simulated, reasons


def _few_alive(report: Report) -> list[str]:
    there = report.peak.by_role.get(Role.ACTIVATION, 0)
    return [] if there else [f"at the peak, in {report.peak.phase.value}, no activation is alive"]
