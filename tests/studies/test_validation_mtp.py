"""Multi-token prediction against a training script around real transformers models: to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors. The script's module is that of DeepSeek-V3
(arXiv:2412.19437, section 2.2): norms of embeddings and of hidden states, a projection of both, a decoder layer of the
model's last kind and a norm, then the model's own head and loss on labels rolled by one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.reading import read_model
from strategies.ddp import Ddp
from studies.options import TrainingOptions, resolve
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact

CASES = Path(__file__).parents[1] / "data" / "oracle" / "mtp.jsonl"


def test_peaks_and_phases():
    assert_exact(validate_oracle(CASES).rows)


@pytest.mark.parametrize("line", list(read_cases(CASES)), ids=lambda line: line["id"])
def test_parameters(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


def test_parameters_of_deepseek_v3():
    """671 B and 11.6 B more; the published 685 B count the shared embeddings and head once more."""
    model = read_model("deepseek-ai/DeepSeek-V3")
    report = simulate(model, Training(weights=BF16, seq_len=16, mtp=model.predictors))
    assert report.parameters == 671_026_404_352 + report.predictor_parameters
    stored = report.parameters + 2 * model.vocab * model.hidden
    assert round(stored / 1e9) == 684


def test_a_number_or_that_of_the_config():
    model = read_model("zai-org/GLM-4.5-Air")
    assert [resolve(TrainingOptions(mtp=given), model).training.mtp for given in (None, "3", "config")] == [0, 3, 1]
    with pytest.raises(UsageError, match="'mtp' must be config or a whole number, not 'some'"):
        resolve(TrainingOptions(mtp="some"), model)
    with pytest.raises(UsageError, match="this config names no modules"):
        resolve(TrainingOptions(mtp="config"), read_model("gpt2"))


@pytest.mark.parametrize(
    ("model", "options", "reason"),
    [
        ("gpt2", {}, "'mtp' is not modelled for gpt2"),
        ("google/gemma-2-2b", {"attention": "eager"}, "gemma2, because its logits are scaled or capped"),
        ("meta-llama/Llama-2-7b-hf", {"implementation": "torchtitan"}, "'mtp' with implementation torchtitan"),
        ("meta-llama/Llama-2-7b-hf", {"items_in_batch": True}, "'mtp' with items_in_batch"),
    ],
)
def test_what_is_not_modelled_is_refused(model, options, reason):
    with pytest.raises(UnsupportedError, match=reason):
        simulate(read_model(model), Training(seq_len=16, mtp=1, **options))


def test_strategies_are_refused():
    with pytest.raises(UnsupportedError, match="'mtp' is not modelled together with ddp yet"):
        simulate(read_model("HuggingFaceTB/SmolLM2-135M"), Training(seq_len=16, mtp=1), [Ddp()])
