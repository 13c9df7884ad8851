"""What the configurations of models with state space layers share."""

from __future__ import annotations

from collections.abc import Mapping

from simulator.families.decoder import FULL
from simulator.families.reader import ConfigReader
from simulator.limits import LARGEST_HEADS, LARGEST_HIDDEN, LARGEST_POSITIONS
from simulator.model import StateSpaceSpec

#: What a report says of such layers, whose memory hangs on installed packages.
PATH = "state space layers: transformers' PyTorch code, which runs without the packages mamba-ssm and causal-conv1d"

LINEAR = "linear_attention"
OLD_NAMES = {"mamba": LINEAR, "attention": FULL}
"""Names that configurations had for kinds of layers before (transformers configuration_utils.py)."""

_Key = tuple[str, int]


def read_state_space(
    config: ConfigReader,
    *,
    heads: _Key,
    head_dim: _Key,
    state: _Key,
    groups: _Key,
    kernel: _Key,
    chunk: _Key,
    conv_bias: str,
    activation: str,
    rule: str | None = None,
) -> StateSpaceSpec:
    """The Mamba-2 mixer of a layer: of each size its key and default; the keys of a flag and of a name.

    Args:
        rule: how the default of `head_dim` is derived, where it is.
    """
    count = config.size(*heads, LARGEST_HEADS)
    shared = config.size(*groups, LARGEST_HEADS)
    config.multiple(heads[0], groups[0], count, shared)
    config.assumptions.append(PATH)
    return StateSpaceSpec(
        heads=count,
        head_dim=config.derived_size(*head_dim, rule, LARGEST_HIDDEN)
        if rule
        else config.size(*head_dim, LARGEST_HIDDEN),
        state=config.size(*state, LARGEST_HIDDEN),
        groups=shared,
        kernel=config.size(*kernel, LARGEST_HIDDEN),
        chunk=config.size(*chunk, LARGEST_POSITIONS),
        conv_bias=config.flag(conv_bias, True),
        activation=config.activation(activation, "silu"),
    )


def read_kinds(config: ConfigReader, key: str, pattern: str, letters: Mapping[str, str]) -> list[str]:
    """The kind of every layer: names under `key`, or a `pattern` of one letter per layer.

    Args:
        letters: letter -> kind; one layer of each is the default of the configuration class.
    """
    if config.given(pattern) and not config.given(key):
        return [letters[letter] for letter in config.letters(pattern, letters)]
    return config.kinds(key, list(letters.values()), OLD_NAMES)
