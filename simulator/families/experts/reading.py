"""What the configurations of mixtures of experts share."""

from __future__ import annotations

import attrs

from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_EXPERTS, LARGEST_LAYERS, LARGEST_WIDTH
from simulator.model import ExpertsSpec, FeedForwardSpec, LayerSpec, ModelSpec, TokenMixerSpec

_WAY_OUT = "set it to false: the load-balancing loss is left out"


def refuse_router_options(config: ConfigReader, *, balanced: bool = False) -> None:
    """Refuse what adds a loss to the logits', unless that is `balanced`, or noise to the router's input."""
    if not balanced:
        config.refuse("output_router_logits", (False, None), _WAY_OUT)
    config.refuse("router_jitter_noise", (None, 0, 0.0), "set it to 0")


def with_load_balancing(config: ConfigReader, spec: ModelSpec) -> ModelSpec:
    """`spec` with the load-balancing loss that ``output_router_logits`` asks for.

    The logits of consecutive layers are added up: layers without a router between them are not modelled.
    """
    if not all(isinstance(layer.channel_mixer, ExpertsSpec) for layer in spec.layers):
        config.refuse("output_router_logits", (False, None), _WAY_OUT)
        return spec
    if not config.given("output_router_logits"):
        return spec
    return attrs.evolve(spec, load_balancing=config.flag("output_router_logits", False))


def read_experts(
    config: ConfigReader,
    *,
    width: tuple[str, int],
    experts: tuple[str, int],
    per_token: int,
    normalised: bool | None = None,
    shared_width: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    balanced: bool = False,
) -> ExpertsSpec:
    """The mixture of experts of a layer.

    Args:
        config: the configuration.
        width: key and default of the channels of one expert.
        experts: key and default of their number.
        per_token: default number of experts that a token visits.
        normalised: default of ``norm_topk_prob``; None where weights are normalised always.
        shared_width: channels of the MLP that every token visits.
        activation: key and default of its name.
        balanced: whether the family models the load-balancing loss (`with_load_balancing`).
    """
    refuse_router_options(config, balanced=balanced)
    count = config.required_size(*experts, LARGEST_EXPERTS)
    chosen = config.required_size("num_experts_per_tok", per_token, LARGEST_EXPERTS)
    too_many = f"num_experts_per_tok must be at most {experts[0]}, not {chosen} and {count}"
    config.check(chosen <= count, too_many, "num_experts_per_tok", experts[0])
    return ExpertsSpec(
        width=config.required_size(*width, LARGEST_WIDTH),
        activation=config.activation(*activation),
        experts=count,
        per_token=min(chosen, count),
        normalised=normalised is None or config.flag("norm_topk_prob", normalised),
        shared_width=shared_width,
    )


def read_routed(
    config: ConfigReader, *, width: int, experts: int, per_token: int, shared: int, normalised: bool | None
) -> ExpertsSpec:
    """Routed experts beside shared ones, which are one MLP as wide as all of them."""
    key = ("moe_intermediate_size", width)
    count = config.size("n_shared_experts", shared, LARGEST_EXPERTS)
    together = count * config.required_size(*key, LARGEST_WIDTH)
    return read_experts(
        config,
        width=key,
        experts=("n_routed_experts", experts),
        per_token=per_token,
        normalised=normalised,
        shared_width=together,
    )


def read_groups(config: ConfigReader, experts: ExpertsSpec, *, groups: int = 1, chosen: int = 1) -> ExpertsSpec:
    """`experts` in ``n_group`` groups of two or more, of which a token may visit ``topk_group``."""
    groups = config.size("n_group", groups, LARGEST_EXPERTS)
    chosen = config.size("topk_group", chosen, LARGEST_EXPERTS)
    apart = experts.experts % groups == 0 and experts.experts >= 2 * groups
    rule = f"n_group must divide the experts into groups of at least two, not {experts.experts} into {groups}"
    config.check(apart, rule, "n_group")
    config.check(chosen <= groups, f"topk_group must be at most n_group, not {chosen} and {groups}", "topk_group")
    return attrs.evolve(
        experts, groups=groups if apart else 1, chosen_groups=chosen if apart and chosen <= groups else 1
    )


def read_sparse_layers(
    config: ConfigReader, depth: int, mixer: TokenMixerSpec | None, dense: FeedForwardSpec, experts: ExpertsSpec
) -> list[LayerSpec]:
    """Layers with experts, but for those of ``mlp_only_layers`` and between steps of ``decoder_sparse_step``."""
    step = config.size("decoder_sparse_step", 1, LARGEST_LAYERS)
    plain = config.indices("mlp_only_layers", depth)
    sparse = [index not in plain and (index + 1) % step == 0 for index in range(depth)]
    return [LayerSpec(mixer, experts if each else dense) for each in sparse]
