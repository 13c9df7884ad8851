"""Dense decoders: legal extremes, windows, and the strategies that refuse them."""

from __future__ import annotations

import attrs
import pytest

from hardware.errors import UnsupportedError
from simulator import Training, simulate
from simulator.mesh import Mesh
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.reading import spec_from_class
from strategies.tensor_parallel import TensorParallel
from tests.strategies import DENSE

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 100,
}


@pytest.mark.parametrize("family", DENSE)
def test_the_smallest_model_and_the_longest_sequence(family):
    """One layer, one head, one channel more than nothing, a vocabulary of one; one token and a million."""
    gated = family != "nemotron"
    attention = AttentionSpec(heads=1, kv_heads=1, head_dim=2)
    layer = LayerSpec(attention, FeedForwardSpec(width=1, activation="silu" if gated else "relu2", gated=gated))
    model = ModelSpec("tiny", family, hidden=2, vocab=1, max_positions=10**6, layers=(layer,))
    peaks = [simulate(model, Training(seq_len=length, attention="eager")).peak.nbytes for length in (1, 10**6)]
    assert peaks[0] < 10**6
    assert peaks[1] > 2 * 10**12


def test_a_window_makes_a_mask_from_its_own_length_on():
    """SDPA gets a boolean mask where the sequence is as long as the window: flash attention is lost there."""
    model = spec_from_class("MistralConfig", {**TINY, "sliding_window": 40}, "m")
    kernels = []
    for length in (32, 40):
        ops = simulate(model, Training(seq_len=length, attention="sdpa")).plan.graph.ops
        kernels.append({op.name for op in ops if "dot_product" in op.name})
    assert kernels[0] != kernels[1]


@pytest.mark.parametrize("config_class", ["MistralConfig", "Qwen3Config", "Gemma3TextConfig"])
def test_tensor_parallelism_without_a_plan_is_refused_by_name(config_class):
    model = spec_from_class(config_class, TINY, "m")
    with pytest.raises(UnsupportedError, match=f"'tensor_parallel' of {model.family} is not modelled"):
        simulate(model, Training(seq_len=8), [TensorParallel()], mesh=Mesh(tp=2))


def test_queries_have_biases_where_outputs_have_none():
    """Qwen2: two biases per key/value channel and one per query channel."""
    model = spec_from_class("Qwen2Config", TINY, "m")
    plain = attrs.evolve(
        model,
        layers=tuple(
            attrs.evolve(layer, token_mixer=attrs.evolve(layer.attention, bias=False)) for layer in model.layers
        ),
    )
    counts = [simulate(each, Training(seq_len=8)).parameters for each in (model, plain)]
    assert counts[0] - counts[1] == 2 * (4 + 2 + 2) * 16
