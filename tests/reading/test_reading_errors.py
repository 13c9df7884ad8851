"""Each wrong input is one line that names field, rule, value and way out; never a traceback."""

import io
import json
import sys
from types import SimpleNamespace

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.errors import UnsupportedError, UsageError
from simulator.families import families
from simulator.model import AttentionSpec, FeedForwardSpec, ModelSpec
from simulator.reading import read_model, spec_from_class, spec_from_config
from tests.strategies import configs, model_specs

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "vocab_size": 1000,
}
KNOWN = ", ".join(families.names())
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000}
GEMMA2 = {**LLAMA, "model_type": "gemma2", "num_key_value_heads": 2}
WAY_OUT = " (correct the config of this {} model)"

VALUES = [
    (LLAMA, {"hidden_size": -4}, "hidden_size must be an integer from 1 to 1048576, not -4"),
    (LLAMA, {"hidden_size": 0}, "hidden_size must be an integer from 1 to 1048576, not 0"),
    (LLAMA, {"hidden_size": 64.0}, "hidden_size must be an integer from 1 to 1048576, not 64.0"),
    (LLAMA, {"hidden_size": float("nan")}, "hidden_size must be an integer from 1 to 1048576, not nan"),
    (LLAMA, {"hidden_size": True}, "hidden_size must be an integer from 1 to 1048576, not true"),
    (LLAMA, {"hidden_size": None}, "hidden_size must be an integer from 1 to 1048576, not null"),
    (LLAMA, {"hidden_size": "64\n"}, r"hidden_size must be an integer from 1 to 1048576, not '64\n'"),
    (LLAMA, {"hidden_size": [64]}, "hidden_size must be an integer from 1 to 1048576, not a list"),
    (LLAMA, {"vocab_size": 10**30}, f"vocab_size must be an integer from 1 to 67108864, not {10**30}"),
    (LLAMA, {"vocab_size": 10**5000}, "vocab_size must be an integer from 1 to 67108864, not an integer of 16610 bits"),
    (LLAMA, {"num_hidden_layers": 10**6}, "num_hidden_layers must be an integer from 1 to 10000, not 1000000"),
    (LLAMA, {"hidden_size": 66}, "hidden_size must be a multiple of num_attention_heads, not 66 and 4"),
    (LLAMA, {"num_key_value_heads": 3}, "num_attention_heads must be a multiple of num_key_value_heads, not 4 and 3"),
    (LLAMA, {"head_dim": 15}, "head_dim must be even for rotary positions, not 15"),
    (LLAMA, {"head_dim": 2**20, "num_attention_heads": 8}, "heads x head_dim must be at most 4194304, not 8 x 1048576"),
    (LLAMA, {"mlp_bias": 1}, "mlp_bias must be true or false, not 1"),
    (LLAMA, {"attention_dropout": 1.5}, "attention_dropout must be a number from 0 to 1, not 1.5"),
    (LLAMA, {"attention_dropout": float("nan")}, "attention_dropout must be a number from 0 to 1, not nan"),
    (LLAMA, {"hidden_act": "silo"}, "hidden_act: no activation named 'silo'; did you mean 'silu' or 'sigmoid'?"),
    (LLAMA, {"hidden_act": 3}, "hidden_act must be the name of an activation, not 3"),
    (
        LLAMA,
        {"num_key_value_head": 2},
        "LlamaConfig has no key 'num_key_value_head': did you mean 'num_key_value_heads'?",
    ),
    (GPT2, {"n_embd": 66}, "n_embd must be a multiple of n_head, not 66 and 4"),
    (GPT2, {"hidden_size": 128}, "n_embd=64 and hidden_size=128 name one size twice: keep one"),
    (GPT2, {"n_inner": 0}, "n_inner must be an integer from 1 to 4194304, not 0"),
    (
        GEMMA2,
        {"layer_types": ["full_attention"]},
        "layer_types must be a list of 3 names out of full_attention, sliding_attention, not of 1",
    ),
    (
        GEMMA2,
        {"layer_types": ["full_attention", 7, "x"]},
        "layer_types must be a list of 3 names out of full_attention, sliding_attention, not 7",
    ),
    (
        GEMMA2,
        {"layer_types": "full_attention"},
        "layer_types must be a list of 3 names out of full_attention, sliding_attention, not 'full_attention'",
    ),
    (
        GEMMA2,
        {"sliding_window": None},
        "sliding_window is null but layer_types has sliding_attention: give a length in tokens",
    ),
    (GEMMA2, {"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a number from 1e-09 to 1e+09, not 0"),
]

REFUSED = [
    (GPT2, {"add_cross_attention": True}, "add_cross_attention=true is not modelled: set it to false"),
    (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true is not modelled: set it to false"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2 is not modelled: set it to 1"),
    (
        GEMMA2,
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=true is not modelled: set it to false",
    ),
    (
        LLAMA,
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config=an object is not modelled: remove it to simulate the model in a plain dtype",
    ),
    (LLAMA, {"output_hidden_states": True}, "output_hidden_states=true is not modelled: set it to false"),
]


def message(action, *arguments):
    with pytest.raises(UsageError) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("base", "change", "text"), VALUES + REFUSED)
def test_a_wrong_value(base, change, text):
    assert message(spec_from_config, {**base, **change}, "m") == f"m: {text}{WAY_OUT.format(base['model_type'])}"


@pytest.mark.parametrize(("base", "change", "text"), REFUSED)
def test_what_is_not_modelled_is_told_apart(base, change, text):
    with pytest.raises(UnsupportedError):
        spec_from_config({**base, **change}, "m")


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"])
def test_a_required_key_must_be_in_a_config_but_not_in_a_class(key):
    rest = {name: value for name, value in LLAMA.items() if name != key}
    assert f"m: {key} is missing and has no safe default: add it" in message(spec_from_config, rest, "m")
    assert spec_from_class("LlamaConfig", rest, "m").family == "llama"


def test_a_missing_key_is_named_with_its_alias():
    config = {key: value for key, value in GPT2.items() if key != "n_embd"}
    assert "m: n_embd (or hidden_size) is missing" in message(spec_from_config, config, "m")


def test_all_errors_come_at_once():
    change = {"hidden_size": -1, "vocab_size": 0, "mlp_bias": "no", "pretraining_tp": 2}
    text = message(spec_from_config, {**LLAMA, **change}, "m")
    assert all(key in text for key in change)
    assert text.count("; ") == 3


def test_a_misspelled_required_key_is_recognised():
    config = {key.replace("hidden_size", "hiden_size"): value for key, value in LLAMA.items()}
    assert "has no key 'hiden_size': did you mean 'hidden_size'?" in message(spec_from_config, config, "m")


def test_an_unknown_family_is_told_what_is_known():
    text = message(spec_from_config, {"model_type": "lama"}, "m")
    assert text.startswith(f"model_type 'lama' is not modelled; did you mean 'llama'? known: {KNOWN}")
    assert text.endswith("register another family with an entry point of the group 'vramsim.families'")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, f"model_type is missing: add it; known: {KNOWN}"),
        ({"architectures": []}, f"model_type is missing: add it; known: {KNOWN}"),
        ({"model_type": 3}, "model_type must be a name such as 'llama', not 3"),
        ([1], "m: a config must be a JSON object, not a list"),
        ("llama", "m: a config must be a JSON object, not 'llama'"),
    ],
)
def test_a_config_without_a_family(config, text):
    assert message(spec_from_config, config, "m") == text


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b'{"model_type": "llama",\n "hidden', "is not valid JSON: Unterminated string starting at at line 2 column 2"),
        (b'{"model_type": "llama"', "is not valid JSON: Expecting ',' delimiter at line 1 column 23"),
        (b"\x80\x02\x93NUMPY", "is not text (byte 0): give a config.json"),
        (b"\x00\x01", "is not valid JSON: Expecting value at line 1 column 1"),
        (b" \n", "is empty: give a config.json"),
        (b"[" * 10**6, "holds a number too long or lists too deep"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "holds a number too long or lists too deep"),
        (b" " * (2**24 + 1), "is larger than 16777216 bytes: give a config.json, not a checkpoint"),
        (b"[]", "a config must be a JSON object, not a list"),
        (b"NaN", "a config must be a JSON object, not nan"),
    ],
)
def test_a_wrong_file(tmp_path, monkeypatch, data, text):
    file = tmp_path / "m.json"
    file.write_bytes(data)
    assert text in message(read_model, str(file))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    assert text in message(read_model, "-")


def test_sources_that_are_not_there(tmp_path, monkeypatch):
    assert message(read_model, "/no/such/config.json") == "no file named '/no/such/config.json': check the path"
    assert "holds no config.json" in message(read_model, str(tmp_path))
    monkeypatch.setattr(sys, "stdin", None)
    assert message(read_model, "-").startswith("stdin is closed")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "config.json").mkdir()
    assert "Is a directory" in message(read_model, str(tmp_path))


@given(st.text(max_size=300))
def test_any_source_gives_a_model_or_one_line(source):
    one_line_or_spec(read_model, f"{source}?")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.integers(2**60, 2**4000)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
KEYS = st.sampled_from(sorted({*LLAMA, *GPT2, "num_key_value_heads", "head_dim", "layer_types", "sliding_window"}))


def one_line_or_spec(action, *arguments):
    try:
        assert isinstance(action(*arguments), ModelSpec)
    except UsageError as error:
        assert str(error).isprintable()


@given(st.dictionaries(KEYS | st.text(), JSON), st.sampled_from(families.names()) | JSON)
def test_any_object_gives_a_model_or_one_line(config, model_type):
    one_line_or_spec(spec_from_config, {**config, "model_type": model_type}, "m")


@given(JSON)
def test_any_json_gives_a_model_or_one_line(config):
    one_line_or_spec(spec_from_config, config, "m")


@given(configs(), st.data())
def test_any_mutation_gives_a_model_or_one_line(config, data):
    key = data.draw(st.sampled_from(sorted(config)))
    changed = {**config, key: data.draw(JSON)}
    one_line_or_spec(spec_from_config, changed, "m")
    del changed[key]
    one_line_or_spec(spec_from_config, changed, data.draw(st.text()))


@given(configs(), st.data())
def test_any_cut_of_a_file_is_refused(config, data):
    text = json.dumps(config)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(cut.encode())))
        assert message(read_model, "-").startswith("'stdin' is")


@given(configs())
def test_legal_configs_are_read(config):
    spec = spec_from_config(config, "m")
    assert len(spec.layers) == config.get("num_hidden_layers", config.get("n_layer"))
    assert spec.hidden == config.get("hidden_size", config.get("n_embd"))


@given(model_specs(max_layers=5))
def test_random_specs_are_legal(spec):
    assert 1 <= len(spec.layers) <= 5
    assert all(layer.attention.groups >= 1 for layer in spec.layers)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: AttentionSpec(4, 3, 8), "heads must be a multiple of kv_heads, not 4 and 3"),
        (lambda: AttentionSpec(True, 1, 8), "heads must be an integer from 1 to 65536, not true"),
        (lambda: AttentionSpec(1, 1, 8, dropout=2.0), "dropout must be a number from 0.0 to 1.0, not 2.0"),
        (lambda: FeedForwardSpec(0), "width must be an integer from 1 to 4194304, not 0"),
        (lambda: attrs.evolve(spec_from_class("GPT2Config", {}, "m"), layers=()), "layers must hold from 1 to 10000"),
    ],
)
def test_specs_check_themselves(build, text):
    assert text in message(build)
