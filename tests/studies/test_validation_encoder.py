"""BERT with both of its heads against real PyTorch code, to the byte.

Recorded with torch 2.13.0 and transformers 5.23.0 on fake CUDA tensors.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware.errors import UnsupportedError, UsageError
from simulator import simulate
from simulator.model import ClassifierSpec
from simulator.reading import spec_from_class
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.recorded import assert_exact

CASES = Path(__file__).parents[1] / "data" / "oracle" / "encoder.jsonl"
CLASSIFIER = {"architectures": ["BertForSequenceClassification"]}


def bert(**config):
    return spec_from_class("BertConfig", config, "mine")


def test_peaks_and_phases():
    assert_exact(validate_oracle(CASES).rows, phases_from=10**6)


@pytest.mark.parametrize("line", list(read_cases(CASES)), ids=lambda line: line["id"])
def test_parameters(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


def test_architectures_decide_the_head():
    assert bert().classifier is None
    assert bert(architectures=["BertForMaskedLM"]).classifier is None
    assert bert(**CLASSIFIER).classifier == ClassifierSpec(classes=2, dropout=0.1)
    assert bert(**CLASSIFIER, id2label={"0": "a", "1": "b", "2": "c"}).classifier == ClassifierSpec(3, 0.1)
    assert bert(**CLASSIFIER, num_labels=4, classifier_dropout=0.3).classifier == ClassifierSpec(4, 0.3)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["BertModel"]}, "architectures 'BertModel' is not modelled: set it to"),
        ({"is_decoder": True}, "is_decoder=true is not modelled"),
        ({"chunk_size_feed_forward": 2}, "chunk_size_feed_forward=2 is not modelled"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false is not modelled"),
        ({**CLASSIFIER, "problem_type": "regression"}, "problem_type='regression' is not modelled"),
    ],
    ids=str,
)
def test_what_is_not_modelled_is_named(config, said):
    with pytest.raises(UnsupportedError, match=said):
        bert(**config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_labels": 1}, "num_labels must be at least 2: regression is not modelled"),
        ({"num_labels": 4, "id2label": {"0": "a", "1": "b"}}, "number of names in id2label, not 4 and 2"),
    ],
    ids=str,
)
def test_wrong_numbers_of_classes_are_named(config, said):
    with pytest.raises(UsageError, match=said):
        bert(**CLASSIFIER, **config)
