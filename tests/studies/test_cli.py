"""The command line as a user meets it: exit codes, one-line errors, JSON that machines can read."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulator import Training, simulate
from studies.cli.main import run
from tests.strategies import configs

SMALL = ["estimate", "gpt2", "--gpus", "a100-80", "--seq-len", "64"]


def call(capsys, *arguments):
    """Exit code, standard output and standard error of one command."""
    code = run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_estimate_says_everything_a_user_asks_for(capsys):
    code, out, err = call(capsys, *SMALL)
    assert (code, err) == (0, "")
    expected = ["GiB", "GB", "allocated", "capacity", "headroom", "verdict", "fits", "by role", "by layer", "where"]
    assert [word for word in expected if word not in out] == []
    assert "--dtype fp32" in out  # a default that was assumed


def test_estimate_json_is_the_report(capsys):
    code, out, _ = call(capsys, *SMALL, "--json", "--micro-batch", "2")
    data = json.loads(out)
    report = simulate("gpt2", Training(micro_batch=2, seq_len=64))
    assert code == 0
    assert data["schema_version"] == 1
    assert data["peak_bytes"] == report.peak.nbytes == data["peak"]["peak_bytes"]
    assert data["cold"]["peak_bytes"] == report.cold.nbytes
    assert sum(data["peak"]["by_role_bytes"].values()) == data["peak_bytes"]
    assert sum(group["count"] * group["each_bytes"] for group in data["by_layer"]) == data["peak_bytes"]
    assert data["model"]["params"] == 124439808
    assert data["fits"] is True
    assert data["headroom_bytes"] == data["gpu"]["capacity_low_bytes"] - data["peak_bytes"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([*SMALL], 0),
        (["estimate", "llama-2-7b", "--gpus", "t4"], 3),
        (["estimate", "gpt2", "--gpus", "a100-80", "--min-headroom", "99%"], 4),
        (["estimate", "gpt2", "--gpus", "a100-80", "--min-headroom", "1GiB"], 0),
        (["estimate", "gemma-2-2b", "--gpus", "a100-80", "--attention", "sdpa"], 2),
        (["estimate", "gemma-2-2b", "--gpus", "a100-80", "--attention", "sdpa", "--strict"], 5),
        (["estimate", "gpt2", "--gpus", "a100-80", "--task", "lora", "--strict"], 5),
        (
            [
                "estimate",
                "mistralai/Mixtral-8x7B-v0.1",
                "--gpus",
                "8xa100-80",
                "--strategy",
                "fsdp2",
                "--ep",
                "2",
                "--strict",
            ],
            5,
        ),
        (["estimate", "gpt2", "--gpus", "a100-80", "--ep", "1"], 0),
        (["models"], 0),
        (["gpus", "--json"], 0),
        (["--help"], 0),
        (["estimate", "--help"], 0),
    ],
)
def test_exit_codes(capsys, arguments, code):
    assert call(capsys, *arguments)[0] == code


BAD = {
    "unknown model": (["estimate", "llama-2-7", "--gpus", "a100-80"], "Llama-2-7b"),
    "unknown gpu": (["estimate", "gpt2", "--gpus", "h10"], "h100"),
    "no gpu": (["estimate", "gpt2"], "--gpus"),
    "unknown option": ([*SMALL, "--micro-btch", "2"], "--micro-batch"),
    "unknown command": (["estimat", "gpt2"], "estimate"),
    "negative batch": ([*SMALL, "--micro-batch", "-1"], "-1"),
    "zero accumulation": ([*SMALL, "--gradient-accumulation", "0"], "gradient_accumulation"),
    "huge sequence": (["estimate", "llama-2-7b", "--gpus", "t4", "--seq-len", "9" * 30], "seq_len"),
    "batch in words": ([*SMALL, "--micro-batch", "two"], "two"),
    "positions": (["estimate", "gpt2", "--gpus", "t4", "--seq-len", "2048"], "1024"),
    "dtype": ([*SMALL, "--dtype", "bf61"], "bf16"),
    "optimizer": ([*SMALL, "--optimizer", "adamv"], "adamw"),
    "optimizer option": ([*SMALL, "--optimizer", "adamw,fused=true"], "implementation"),
    "optimizer value": ([*SMALL, "--optimizer", "sgd,momentum=fast"], "momentum"),
    "implementation": ([*SMALL, "--optimizer", "adafactor,implementation=fused"], "foreach"),
    "foreign momentum": ([*SMALL, "--optimizer", "adamw,momentum=0.9"], "sgd"),
    "attention": ([*SMALL, "--attention", "flash"], "flash_attention_2"),
    "flash in fp32": ([*SMALL, "--attention", "flash_attention_2"], "16-bit"),
    "padded flash 2": ([*SMALL, "--attention", "flash_attention_2", "--dtype", "bf16", "--padding", "padded"], "sdpa"),
    "checkpointing": ([*SMALL, "--checkpointing", "ful"], "full"),
    "clip": ([*SMALL, "--clip", "-1"], "clip"),
    "clip nan": ([*SMALL, "--clip", "nan"], "clip"),
    "global batch": ([*SMALL, "--global-batch", "7", "--micro-batch", "2"], "multiple"),
    "huge global batch": ([*SMALL, "--global-batch", str(2**40)], "global-batch"),
    "task": ([*SMALL, "--task", "lorra"], "lora"),
    "unmodelled task": ([*SMALL, "--task", "dpo"], "full, pretrain"),
    "misspelt optimizer option": ([*SMALL, "--optimizer", "adamw,implementaton=fused"], "implementation"),
    "plot name too long": ([*SMALL, "--plot", "x" * 300 + ".png"], "plot"),
    "both batches": ([*SMALL, "--global-batch", "8", "--gradient-accumulation", "2"], "one of the two"),
    "torch": ([*SMALL, "--torch", "two"], "2.13"),
    "headroom": ([*SMALL, "--min-headroom", "150%"], "min-headroom"),
    "plot format": ([*SMALL, "--plot", "x.gif"], ".png"),
    "plot folder": ([*SMALL, "--plot", "/no/such/folder/x.png"], "folder"),
    "several gpus": (["estimate", "gpt2", "--gpus", "2xa100-80"], "fsdp2"),
    "validate nothing": (["validate", "oracle", "--cases", "/no/such/file"], "cases"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_wrong_input_is_one_line_with_a_way_out(capsys, name):
    arguments, hint = BAD[name]
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert hint in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"model_type": "llama", "hidden_size": 64', "JSON"),
        ("", "stdin"),
        ("[1, 2]", "object"),
        ('{"model_type": "llama"}', "hidden_size"),
        ('{"model_type": "lama", "hidden_size": 64}', "llama"),
        (
            '{"model_type": "gpt2", "n_embd": 65, "n_layer": 2, "n_head": 4, "vocab_size": 100}',
            "n_head",
        ),
        ('{"model_type": "gpt2", "n_embd": -64, "n_layer": 2, "n_head": 4, "vocab_size": 100}', "-64"),
    ],
)
def test_a_wrong_config_on_stdin(capsys, monkeypatch, text, hint):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code, out, err = call(capsys, "estimate", "-", "--gpus", "a100-80")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert hint in err


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs(), data=st.data())
def test_any_config_gives_a_number_or_one_line(capsys, tmp_path, config, data):
    """A config file is simulated or, with a key broken, refused in one line: never a traceback."""
    if data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(config)))
        config[key] = data.draw(st.sampled_from([None, -1, 0, "x", 10**30, 1.5, [], {}]))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    code, out, err = call(capsys, "estimate", str(path), "--gpus", "a100-80", "--seq-len", "32", "--json")
    if code in (0, 3, 4):
        assert json.loads(out)["peak_bytes"] > 0
    else:
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_the_plot_is_never_overwritten_unasked(capsys, tmp_path):
    target = tmp_path / "timeline.png"
    target.write_text("mine")
    assert call(capsys, *SMALL, "--plot", str(target))[0] == 2
    assert target.read_text() == "mine"
    assert call(capsys, *SMALL, "--plot", str(target), "--force")[0] == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_our_own_error_is_told_from_the_users(capsys, monkeypatch):
    monkeypatch.setattr("studies.ranks.simulate", lambda *_, **__: 1 / 0)
    code, out, err = call(capsys, *SMALL)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "ZeroDivisionError" in err


def test_models_and_gpus_as_json(capsys):
    models = json.loads(call(capsys, "models", "--json")[1])
    assert {"id": "openai-community/gpt2", "params": 124439808}.items() <= {
        key: value for model in models for key, value in model.items() if model["id"] == "openai-community/gpt2"
    }.items()
    gpus = json.loads(call(capsys, "gpus", "--json")[1])
    assert all(gpu["capacity_low_bytes"] <= gpu["capacity_high_bytes"] and gpu["source"] for gpu in gpus)


def test_bounds_of_validate(capsys, tmp_path):
    line = {
        "id": "x",
        "case": {"mode": "infer"},
        "config_class": "GPT2Config",
        "config": {},
        "prefill": {"peak_r512": 8},
    }
    cases = tmp_path / "cases.jsonl"
    cases.write_text(json.dumps(line) + "\n")
    bounds = ["--max-mean", "1", "--max-worst", "2"]
    code, out, err = call(capsys, "validate", "oracle", "--cases", str(cases), "--json", *bounds)
    assert (code, err.count("\n")) == (3, 1)
    assert "max-mean" in err
    assert "max-worst" in err
    assert "no case was compared" in err
    assert json.loads(out)["summary"] == {
        "n": 0, "unsupported": 1, "mean_abs_error_pct": None, "worst_abs_error_pct": None,
        "worst_abs_role_error_pct": None,
    }  # fmt: skip


def test_the_start_loads_no_heavy_library():
    """Help and errors answer at once: nothing slow is imported before it is needed."""
    heavy = ("numpy", "networkx", "matplotlib", "sympy", "rich")
    code = f"import sys, studies.cli.main; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"
