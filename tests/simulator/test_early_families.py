"""Early decoders and encoders: parameters, legal extremes, what they make the command line say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from hardware.errors import UsageError
from simulator import Training, simulate
from simulator.plan import make_plan
from simulator.reading import spec_from_class, spec_from_config
from studies.options import TrainingOptions, resolve
from tests.strategies import EARLY, early_configs

EAGER = Training(seq_len=8, attention="eager")
CONFIG_CLASSES = {"bert": "BertConfig", "biogpt": "BioGptConfig", "gpt_neo": "GPTNeoConfig", "mpt": "MptConfig"}


@settings(max_examples=60)
@given(early_configs())
def test_parameters_are_the_graphs_parameter_storages(config):
    """The count of a model is the sum over the storages of its graph, with every layer built and with few."""
    model = spec_from_config(config, "m")
    plan = make_plan(model, EAGER, unrolled=True)
    storages = {tensor.storage for tensor in plan.graph.parameters}
    held = sum(int(storage.size.elements(plan.dimensions.bindings)) for storage in storages)
    assert simulate(model, EAGER).parameters == held


@settings(max_examples=60)
@given(early_configs())
def test_read_configs_keep_their_sizes(config):
    model = spec_from_config(config, "m")
    assert (model.hidden, model.vocab) == (config["hidden_size"], config["vocab_size"])
    assert len(model.layers) == config["num_hidden_layers"]


@pytest.mark.parametrize("family", EARLY)
def test_one_token_and_a_batch_of_one(family):
    """The least that there is: one layer, one token, a vocabulary of two."""
    heads = 4 if family == "codegen" else 1
    config = {"model_type": family, "hidden_size": 8 * heads, "num_hidden_layers": 1, "num_attention_heads": heads}
    config |= {"vocab_size": 2, "intermediate_size": 1, "ffn_dim": 1, "rotary_dim": 2}
    config |= {"attention_types": [[["local"], 1]]}
    report = simulate(spec_from_config(config, "m"), Training(micro_batch=1, seq_len=1, attention="eager"))
    assert 0 < report.peak.nbytes < 10**8


@pytest.mark.parametrize("family", ["CodeGenConfig", "GPTNeoConfig", "MptConfig", "BloomConfig"])
def test_families_without_sdpa_are_eager_unless_told_otherwise(family):
    assert resolve(TrainingOptions(seq_len=8), spec_from_class(family, {}, "m")).training.attention == "eager"


@pytest.mark.parametrize("family", sorted(CONFIG_CLASSES))
def test_a_sequence_longer_than_the_positions_is_refused(family):
    model = spec_from_class(CONFIG_CLASSES[family], {}, "m")
    with pytest.raises(UsageError, match=f"'seq-len' must be at most the model's {model.max_positions} positions"):
        resolve(TrainingOptions(seq_len=model.max_positions + 1), model)
