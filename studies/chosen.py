"""Options with defaults filled in: which were, which would change nothing, and what is said about both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hardware.errors import UsageError
from simulator.families import families
from simulator.model import ExpertsSpec, ModelSpec
from simulator.workload import MEGATRON, Training
from studies.optimizer_options import optimizer_assumptions

if TYPE_CHECKING:
    from studies.options import TrainingOptions

#: transformers refuses ``sdpa`` for a model with soft-capped scores or sinks, and some classes have none.
_DEFAULT_ATTENTION = dict.fromkeys(("bloom", "codegen", "gemma2", "gpt_neo", "gpt_oss", "mpt"), "eager")
#: The newest version whose behaviour was compared with recordings, and the default.
NEWEST_TORCH = (2, 13)


class Chosen:
    """Options with defaults filled in, remembering which were."""

    def __init__(self, options: TrainingOptions, model: ModelSpec) -> None:
        self._options = options
        self._defaults: dict[str, Any] = {
            "task": "full",
            "dtype": "fp32",
            "optimizer": "adamw",
            "micro_batch": 1,
            "seq_len": min(1024, model.max_positions),
            "attention": _DEFAULT_ATTENTION.get(model.family, "sdpa"),
            "sdpa_backend": "auto",
            "padding": "none",
            "experts": "grouped_mm",
            "expert_imbalance": 1.0,
            "checkpointing": "none",
            "zero_grad": "none",
            "torch": dotted(NEWEST_TORCH),
            "implementation": "transformers",
            "loss": "default",
        }
        self._family = model.family
        experts = [layer.channel_mixer for layer in model.layers if isinstance(layer.channel_mixer, ExpertsSpec)]
        self._routed = bool(experts)
        self._attends = any(layer.attends for layer in model.layers)
        self._most_uneven = max((each.experts / each.per_token for each in experts), default=1.0)

    def __getitem__(self, name: str) -> Any:
        given = getattr(self._options, name)
        return self._defaults[name] if given is None else given

    def assumed(self, training: Training) -> list[str]:
        """A line for each default that matters, and what people may not expect of the workload."""
        left_out = [name for name in self._defaults if getattr(self._options, name) is None and self._matters(name)]
        if self._options.checkpoint_every is not None:
            left_out.remove("checkpointing")
        lines = [f"{_as_typed(name)} {self._defaults[name]}{self._why(name)}" for name in left_out]
        if self._options.global_batch is None and self._options.gradient_accumulation is None:
            lines.append("--gradient-accumulation 1")
        if self._options.clip is None:
            lines.append("gradients are not clipped (--clip)")
        if not self._options.keep_outputs:
            lines.append("the model's outputs are dropped before backward (--keep-outputs holds them)")
        if self._options.liger:
            lines.append(f"--liger-kernels {','.join(training.liger.kernels)}")
        if training.liger.rms_norm and self._options.multiprocessors is None:
            lines.append(f"--multiprocessors {training.liger.multiprocessors} (of an H100 SXM; Liger's norms use them)")
        lines += optimizer_assumptions(self["optimizer"], training.optimizer)
        if training.torch > NEWEST_TORCH:
            lines.append(f"torch {dotted(training.torch)} behaves as {dotted(NEWEST_TORCH)}, the newest compared")
        return lines

    def check_idle(self) -> None:
        """Refuse options that would change nothing, and more tokens for one expert than there are."""
        for name, reason in self._idle().items():
            if getattr(self._options, name) is not None:
                raise UsageError(f"{name.replace('_', '-')!r} changes nothing: {reason}")
        if self._routed and self["expert_imbalance"] > self._most_uneven:
            most = f"{self._most_uneven:g}, where one expert gets every token"
            raise UsageError(f"'expert-imbalance' must be at most {most}: {self['expert_imbalance']:g}")

    def _idle(self) -> dict[str, str]:
        """Options that are about something the model or the workload does not have -> why."""
        found: dict[str, str] = {}
        if families.get(self._family).counted:  # what is refused then is the model itself
            return found
        if not self._routed:
            routing = ("experts", "expert_imbalance", "capacity_factor", *(["ep"] if self._options.ep != 1 else []))
            found = dict.fromkeys(routing, f"this {self._family} has no experts")
        elif self["implementation"] in MEGATRON:
            found = {"experts": f"{self['implementation']} runs experts its own way"}
        if not self._attends:
            found |= dict.fromkeys(("attention", "sdpa_backend"), f"this {self._family} has no attention")
        elif self["attention"] != "sdpa":
            found["sdpa_backend"] = f"attention is {self['attention']}"
        return found

    def _matters(self, name: str) -> bool:
        """Whether a default is worth a line."""
        if name == "expert_imbalance":
            return self._uneven and name not in self._idle()
        return name not in self._idle()

    @property
    def _uneven(self) -> bool:
        """Whether it decides sizes where tokens go."""
        if self["implementation"] in MEGATRON:
            return (self._options.ep or 1) > 1 and self._options.capacity_factor is None
        return bool(self["experts"] == "eager")

    def _why(self, name: str) -> str:
        """The reason of a default that is not the same for every model."""
        if name == "attention" and self._family in _DEFAULT_ATTENTION:
            return f" ({self._family}'s own default: transformers refuses sdpa for it)"
        return ""


def _as_typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def dotted(version: tuple[int, int]) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))
