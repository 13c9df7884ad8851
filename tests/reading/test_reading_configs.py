"""Configs of the three families: class defaults, derived values, and where they are recorded."""

import json
import subprocess
import sys

import pytest

from simulator.families import BUILT_IN, Family, families
from simulator.model import AttentionSpec, FeedForwardSpec, LayerSpec, ModelSpec
from simulator.reading import read_model, spec_from_class, spec_from_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "vocab_size": 1000,
}


def test_the_defaults_of_gpt2config():
    """transformers 5.23.0 configuration_gpt2.py, field by field."""
    attention = AttentionSpec(heads=12, kv_heads=12, head_dim=64, bias=True, dropout=0.1)
    layer = LayerSpec(attention, FeedForwardSpec(width=3072, activation="gelu_new", gated=False, bias=True))
    spec = spec_from_class("GPT2Config", {}, "x")
    assert spec == ModelSpec(
        name="x",
        family="gpt2",
        hidden=768,
        vocab=50257,
        max_positions=1024,
        layers=(layer,) * 12,
        tied_embeddings=True,
        embedding_dropout=0.1,
        residual_dropout=0.1,
        assumptions=spec.assumptions,
    )


def test_the_defaults_of_llamaconfig():
    """transformers 5.23.0 configuration_llama.py, field by field."""
    layer = LayerSpec(AttentionSpec(heads=32, kv_heads=32, head_dim=128), FeedForwardSpec(width=11008))
    spec = spec_from_class("LlamaConfig", {}, "x")
    assert spec == ModelSpec("x", "llama", 4096, 32000, 2048, (layer,) * 32, assumptions=spec.assumptions)


def test_the_defaults_of_gemma2config():
    """transformers 5.23.0 configuration_gemma2.py, field by field."""
    feed_forward = FeedForwardSpec(width=9216, activation="gelu_pytorch_tanh")
    sliding = AttentionSpec(heads=8, kv_heads=4, head_dim=256, window=4096, softcap=50.0)
    full = AttentionSpec(heads=8, kv_heads=4, head_dim=256, softcap=50.0)
    layers = (LayerSpec(sliding, feed_forward), LayerSpec(full, feed_forward)) * 13
    spec = spec_from_class("Gemma2Config", {}, "x")
    rest = {"tied_embeddings": True, "final_softcap": 30.0, "assumptions": spec.assumptions}
    assert spec == ModelSpec("x", "gemma2", 2304, 256000, 8192, layers, **rest)


def test_each_default_is_recorded():
    assert spec_from_config(LLAMA, "x").assumptions == (
        "attention_bias: false (LlamaConfig default)",
        "num_key_value_heads: 4 (LlamaConfig default: num_attention_heads)",
        "head_dim: 16 (LlamaConfig default: hidden_size // num_attention_heads)",
        "attention_dropout: 0.0 (LlamaConfig default)",
        "mlp_bias: false (LlamaConfig default)",
        "hidden_act: silu (LlamaConfig default)",
        "max_position_embeddings: 2048 (LlamaConfig default)",
        "tie_word_embeddings: false (LlamaConfig default)",
    )


def test_given_values_win_over_defaults():
    given = {"num_key_value_heads": 2, "head_dim": 6, "attention_bias": True, "attention_dropout": 0.25}
    spec = spec_from_config({**LLAMA, **given, "mlp_bias": True, "hidden_act": "swish"}, "x")
    attention = AttentionSpec(heads=4, kv_heads=2, head_dim=6, bias=True, dropout=0.25)
    assert spec.layers == (LayerSpec(attention, FeedForwardSpec(100, activation="silu", bias=True)),) * 3


def test_keys_that_do_not_change_memory_are_ignored():
    harmless = {"rope_scaling": {"factor": 8.0}, "bos_token_id": 1, "transformers_version": "4.40", "pretraining_tp": 1}
    assert spec_from_config({**LLAMA, **harmless, "quantization_config": None}, "x") == spec_from_config(LLAMA, "x")


def test_gpt2_takes_the_general_names_too():
    names = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    own = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
    rest = {"model_type": "gpt2", "vocab_size": 10, "scale_attn_by_inverse_layer_idx": True}
    assert spec_from_config({**rest, **names}, "x") == spec_from_config({**rest, **own}, "x")


def test_gemma2_follows_its_list_of_layer_types():
    kinds = ["full_attention", "full_attention", "sliding_attention"]
    spec = spec_from_class("Gemma2Config", {"num_hidden_layers": 3, "layer_types": kinds, "sliding_window": 7}, "x")
    assert [layer.attention.window for layer in spec.layers] == [None, None, 7]


def test_gemma2_without_sliding_layers_needs_no_window():
    kinds = {"num_hidden_layers": 1, "layer_types": ["full_attention"], "sliding_window": None}
    assert spec_from_class("Gemma2Config", kinds, "x").layers[0].attention.window is None


def test_null_turns_a_softcap_off():
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    spec = spec_from_class("Gemma2Config", caps, "x")
    assert (spec.final_softcap, spec.layers[0].attention.softcap) == (None, None)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("LlamaForCausalLM", "llama"),
        ("GPT2LMHeadModel", "gpt2"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("LlamaModel", "llama"),
    ],
)
def test_architectures_decide_where_model_type_is_missing(name, family):
    values = {} if family == "gpt2" else {key: value for key, value in LLAMA.items() if key != "model_type"}
    sizes = values or {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 9}
    heads = {"num_key_value_heads": 4} if family == "gemma2" else {}
    assert spec_from_config({**sizes, **heads, "architectures": [name]}, "x").family == family


def test_a_path_a_folder_and_stdin_read_alike(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    file = folder / "config.json"
    file.write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert read_model(str(file)) == read_model(str(folder)) == spec_from_config(LLAMA, "tiny")
    code = "from simulator.reading import read_model; print(len(read_model('-').layers))"
    run = subprocess.run([sys.executable, "-c", code], stdin=file.open(), capture_output=True, text=True, check=True)
    assert run.stdout == "3\n"


def test_a_run_folder_does_not_hide_the_preset_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_model("gpt2").name == "openai-community/gpt2"


def test_only_the_family_that_is_needed_is_imported():
    code = "import sys; from simulator.reading import read_model; read_model('gpt2'); print('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    recipes = {module for module, _ in BUILT_IN.values()}
    assert recipes.intersection(run.stdout.split()) == {"simulator.families.early.gpt2"}


def test_a_taken_family_name_is_refused():
    with pytest.raises(ValueError, match="'llama' is registered already"):
        families.add("llama", Family("llama", lambda config: None))


def test_a_registered_family_is_read(monkeypatch):
    def read(config):
        layer = LayerSpec(AttentionSpec(1, 1, 8), FeedForwardSpec(8))
        return ModelSpec(config.name, config.family, config.size("width", 8, 99), 10, 10, (layer,))

    monkeypatch.setitem(families._items, "toy", Family("toy", read, config_class="ToyConfig"))
    assert spec_from_config({"model_type": "toy"}, "x").assumptions == ("width: 8 (ToyConfig default)",)
    assert spec_from_class("ToyConfig", {"width": 9}, "x").hidden == 9
    assert spec_from_config({"architectures": ["ToyForCausalLM"], "width": 7}, "x").hidden == 7
    assert "toy" in families.names()
