"""What was not compared with recordings together, and is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from hardware.errors import UnsupportedError, UsageError
from simulator.blocks import PREDICTOR
from simulator.decoder import items_of
from simulator.liger import check_family
from simulator.model import ExpertsSpec
from simulator.runtime import Hooks
from simulator.trace import Trace
from simulator.workload import MEGATRON

if TYPE_CHECKING:
    from simulator.plan import Plan


def refuse_together(what: str, others: Iterable[str]) -> None:
    """`UnsupportedError` where there is anything that `what` was not compared with."""
    found = ", ".join(others)
    if found:
        raise UnsupportedError(f"{what} is not modelled together with {found} yet: leave one out")


def regimes(plan: Plan, *apart: str) -> list[str]:
    """What a plan has besides a model on one device, by the names that users know; those named `apart` left out."""
    training = plan.training
    given = {
        "checkpointing": plan.recomputed,
        "tensor_parallel": plan.tensor_parallel,
        "context_parallel": plan.context_parallel,
        "pipeline": plan.pipeline,
        "float8": plan.float8,
        "compile": plan.compiled,
        "frozen weights": plan.frozen or plan.frozen_layers,
        "liger": training.liger.kernels,
        "items_in_batch": training.items_in_batch,
        "autocast": training.autocast,
        "grad_scaler": training.grad_scaler,
        "optimizer_in_backward": training.optimizer_in_backward,
        "keep_outputs": training.keep_outputs,
    }
    return [name for name, value in given.items() if value and name not in apart]


def hook_name(hooks: Hooks) -> str:
    """The name of a framework's hooks, for users."""
    return str(getattr(hooks, "name", type(hooks).__name__))


def has_experts(plan: Plan) -> bool:
    """Whether some layer of the model routes tokens to experts."""
    return any(isinstance(layer.channel_mixer, ExpertsSpec) for layer in plan.model.layers)


def check_combination(plan: Plan) -> None:
    """Refuse what a plan must not have together, as far as its graph need not be there.

    Raises:
        UnsupportedError: what was not compared with recordings.
        UsageError: what changes nothing.
    """
    check_family(plan.training.liger, plan.model.family)
    names = [hook_name(hooks) for hooks in plan.hooks]
    if plan.training.liger.kernels:
        others = [hook_name(hooks) for hooks in plan.hooks if not getattr(hooks, "around_liger", False)]
        refuse_together("'liger'", [*_among(plan, "tensor_parallel", "float8", "frozen weights"), *others])
    if plan.training.items_in_batch:
        refuse_together("'items_in_batch'", [*_among(plan, "tensor_parallel"), *names])
    if plan.training.mtp:
        others = _among(plan, "tensor_parallel", "pipeline", "float8", "compile", "frozen weights")
        refuse_together("'mtp'", [*others, *names])
    if plan.saved_on_host:
        implementation = plan.training.implementation
        code = [] if implementation == "transformers" else [f"implementation {implementation}"]
        parallel = _among(plan, "tensor_parallel", "context_parallel", "pipeline")
        others = _among(plan, "checkpointing", "float8", "compile", "liger")
        refuse_together("activation_offload", [*parallel, *others, *code, *names])
    _check_experts(plan)


def _among(plan: Plan, *names: str) -> list[str]:
    return [name for name in regimes(plan) if name in names]


def _check_experts(plan: Plan) -> None:
    """Refuse ranks that share experts where there are none, or where the code does not share them."""
    ranks, implementation = plan.mesh.ep, plan.training.implementation
    if ranks == 1:
        return
    if implementation not in MEGATRON:
        raise UnsupportedError(f"'ep' {ranks} is modelled with implementation megatron_te, not {implementation}")
    refuse_together(f"'ep' {ranks}", _among(plan, "context_parallel"))
    if not has_experts(plan):
        raise UsageError(f"'ep' {ranks} is for experts, which this model has not: leave it out")


def check_built(plan: Plan, trace: Trace) -> None:
    """Refuse what the recipe has not taken: ``num_items_in_batch``, modules that predict further tokens."""
    ops = trace.graph.ops
    if trace.regime.items_in_batch and not any(x in op.inputs for op in ops for x in items_of(trace.graph)):
        raise UnsupportedError("'items_in_batch' is not taken by the loss of this model: leave it out")
    if plan.training.mtp and not any(op.module.startswith(PREDICTOR) for op in ops):
        raise UnsupportedError(f"'mtp' is not modelled for {plan.model.family}: set it to 0")
