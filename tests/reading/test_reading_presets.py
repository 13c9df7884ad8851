"""Every preset reads as the published model it is."""

import csv
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest

from hardware.errors import UsageError
from simulator.presets import preset_names, preset_source, short_names
from simulator.reading import read_model
from studies import catalogue

SAMPLE = Path(__file__).with_name("presets_sample.csv")
SHARED = Path(__file__).parents[3] / "shared" / "reference" / "models.csv"
FILES = [SAMPLE, *([SHARED] if SHARED.exists() else [])]


COUNTS = Path(__file__).with_name("presets_parameters.csv")
"""Parameters of the class that transformers 5.23.0 builds on the meta device from each preset."""
HAND_COUNTED = ("gpt2", "llama", "gemma2")


def rows():
    read = [(path.stem, row) for path in FILES for row in csv.DictReader(path.read_text().splitlines())]
    ours = [(stem, row) for stem, row in read if row.get("model_type", "llama") in HAND_COUNTED]
    return [pytest.param(row, id=f"{stem}:{row['id']}") for stem, row in ours]


@pytest.mark.parametrize("row", rows())
def test_a_preset_has_the_published_sizes(row):
    spec = read_model(row["id"])
    attention, feed_forward = spec.layers[0].attention, spec.layers[0].feed_forward
    expected = [int(row[key]) for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "max_pos")]
    sizes = [len(spec.layers), spec.hidden, attention.heads, attention.kv_heads, attention.head_dim]
    assert [*sizes, spec.vocab, spec.max_positions] == expected
    assert feed_forward.width == int(row["ffn"] or 4 * spec.hidden)
    assert str(spec.tied_embeddings) == row["tied"]


@pytest.mark.parametrize("row", rows())
def test_a_preset_has_the_published_number_of_parameters(row):
    if "params_total" in row:
        assert parameters(read_model(row["id"])) == int(row["params_total"])


@pytest.mark.parametrize("row", list(csv.DictReader(COUNTS.read_text().splitlines())), ids=lambda row: row["id"])
def test_every_preset_counts_what_transformers_builds(row):
    text, beside = catalogue.parameters(read_model(row["id"]))
    assert (text + beside, text) == (int(row["total"]), int(row["text"]))


def test_every_preset_has_a_recorded_count():
    assert [row["id"] for row in csv.DictReader(COUNTS.read_text().splitlines())] == preset_names()


def parameters(spec):
    """Counted here by hand, independently of the op library."""
    plain = spec.family == "gpt2"
    norm = spec.hidden * (2 if plain else 1)
    total = spec.vocab * spec.hidden * (1 if spec.tied_embeddings else 2) + norm
    total += spec.max_positions * spec.hidden if plain else 0
    return total + sum(layer_parameters(spec, layer, norm) for layer in spec.layers)


def layer_parameters(spec, layer, norm):
    attention, feed_forward = layer.attention, layer.feed_forward
    query, pair = attention.heads * attention.head_dim, 2 * attention.kv_heads * attention.head_dim
    matrices = spec.hidden * (2 * query + pair) + spec.hidden * feed_forward.width * (3 if feed_forward.gated else 2)
    biases = (query + pair + spec.hidden) * attention.bias + (feed_forward.width + spec.hidden) * feed_forward.bias
    return matrices + biases + norm * (4 if spec.family == "gemma2" else 2)


def test_the_index_lists_the_files():
    names = {f"{name.replace('/', '--')}.json" for name in preset_names()}
    assert {file.name for file in files("simulator.presets").iterdir() if file.name.endswith(".json")} == names
    assert all(preset_source(name) for name in preset_names())


def test_short_names_are_unambiguous():
    counts = Counter(short for name in preset_names() for short in set(short_names(name)))
    assert [short for short, count in counts.items() if count > 1] == []


@pytest.mark.parametrize(
    ("short", "name"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("GPT2-XL", "openai-community/gpt2-xl"),
        ("llama-2-7b", "meta-llama/Llama-2-7b-hf"),
        ("Llama-2-7b-HF", "meta-llama/Llama-2-7b-hf"),
        ("META-LLAMA/llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        ("llama-3.1-405b", "meta-llama/Meta-Llama-3.1-405B"),
        ("meta-llama-3.1-405b", "meta-llama/Meta-Llama-3.1-405B"),
        ("gemma-2-2b", "google/gemma-2-2b"),
        ("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B"),
    ],
)
def test_short_names(short, name):
    assert read_model(short).name == name


@pytest.mark.parametrize(
    ("typed", "meant"), [("llama-2-7", "Llama-2-7b-hf"), ("gpt-2", "gpt2"), ("gema-2-9b", "gemma-2-9b")]
)
def test_a_near_miss_gets_a_suggestion(typed, meant):
    with pytest.raises(UsageError, match=f"did you mean .*{meant}"):
        read_model(typed)


def test_a_far_miss_gets_the_list():
    with pytest.raises(UsageError, match=r"named 'zzz'; known: .*openai-community/gpt2"):
        read_model("zzz")


def test_modules_that_predict_further_tokens_are_named():
    """transformers builds none of DeepSeek-V3's; a model without them says nothing."""
    named = [line for line in read_model("deepseek-ai/DeepSeek-V3").assumptions if "num_nextn_predict_layers 1" in line]
    assert len(named) == 1
    assert not any("nextn" in line for line in read_model("moonshotai/Kimi-K2-Instruct").assumptions)
