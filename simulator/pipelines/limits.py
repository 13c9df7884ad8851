"""What was not compared with recordings of pipelines, and is refused in them."""

from __future__ import annotations

from hardware.errors import UnsupportedError
from simulator.combinations import hook_name, refuse_together, regimes
from simulator.plan import Plan


def check_pipeline(plan: Plan) -> None:
    """Refuse what was not compared with recordings of pipelines.

    Raises:
        UnsupportedError: the option, and a way out.
    """
    training, split = plan.training, plan.pipeline is not None and plan.pipeline.splits_backward
    names = {hook_name(hooks): hooks for hooks in plan.hooks}
    for name, hooks in names.items():
        if not getattr(hooks, "in_stages", False):
            raise UnsupportedError(f"a pipeline with {name} in its stages is not modelled: use fsdp2 or ddp")
        if split and not getattr(hooks, "in_split_backward", False):
            raise UnsupportedError(
                f"{name} is not told of weights' gradients where backward is split in two, and would not reduce them: "
                "use fsdp2, or schedule interleaved_1f1b"
            )
    if split and plan.recomputed:
        raise UnsupportedError("checkpoints in a backward split in two are not modelled: take another schedule")
    if plan.tensor_parallel and training.implementation != "torchtitan":
        raise UnsupportedError("'tp' in a pipeline is modelled for implementation torchtitan alone: use it, or tp 1")
    in_stages = {
        "checkpoints of several layers, some of which other ranks have": plan.together > 1,
        "checkpoints of modules and a strategy in its stages": bool(names) and bool(plan.recomputed_modules),
        "zero_grad zero and a strategy in its stages": bool(names) and training.zero_grad == "zero",
        "reentrant checkpoints": plan.reentrant,
    }
    found = [name for name, given in in_stages.items() if given]
    # torchtitan leaves autocast to fsdp2's param_dtype
    refuse_together("a pipeline", [*found, *regimes(plan, "pipeline", "checkpointing", "tensor_parallel")])
