"""``--framework``: one word for what a framework does by default."""

from __future__ import annotations

import json

import pytest

from studies.cli.main import run

HF = ["--implementation", "transformers", "--dtype", "amp-bf16", "--optimizer", "adamw,implementation=fused"]
HF += ["--clip", "1", "--keep-inputs"]
TITAN = ["--implementation", "torchtitan", "--optimizer", "adamw,implementation=fused", "--clip", "1"]
TITAN += ["--checkpointing", "ops"]
UNTIED = "fsdp2,param_dtype=bf16,reduce_dtype=fp32,wrap=layer+embedding+head"
SHARDED = ["--strategy", "tensor_parallel,sequence_parallel=true,loss_parallel=true", "--strategy", UNTIED]
MEGATRON = ["--implementation", "megatron_te", "--dtype", "bf16", "--sdpa-backend", "flash", "--clip", "1"]
MEGATRON += ["--optimizer", "adamw,implementation=fused", "--strategy"]
MEGATRON += ["megatron_distributed_optimizer,gradient_accumulation_fusion=true"]
LITGPT = ["--dtype", "amp-bf16", "--optimizer", "adamw"]
ZERO = ["--strategy", "deepspeed_zero2"]
DEEPSPEED = ["--dtype", "bf16", "--optimizer", "adamw,implementation=fused", "--clip", "1"]
MODEL = "llama-3.1-8b"

#: Framework, model, GPUs, further options, and all that the framework stands for there, written out.
WRITTEN_OUT = {
    "hf alone": ("hf", MODEL, 1, [], [*HF, "--items-in-batch"]),
    "hf": ("hf", MODEL, 8, [], [*HF, "--strategy", "ddp,find_unused_parameters=true"]),
    "hf recomputed": ("hf", MODEL, 8, ["--checkpointing", "full"], [*HF, "--strategy", "ddp"]),
    "torchtitan alone": ("torchtitan", MODEL, 1, [], [*TITAN, "--dtype", "amp-bf16"]),
    "torchtitan": ("torchtitan", MODEL, 8, [], [*TITAN, "--strategy", UNTIED]),
    "torchtitan in shards": ("torchtitan", MODEL, 8, ["--tp", "2", "--checkpointing", "full"], [*TITAN[:-2], *SHARDED]),
    "torchtitan tied": ("torchtitan", "llama-3.2-1b", 8, [], [*TITAN, "--strategy", UNTIED.rpartition(",")[0]]),
    "megatron alone": ("megatron", MODEL, 1, [], MEGATRON),
    "megatron": ("megatron", MODEL, 8, ["--tp", "2"], MEGATRON),
    "deepspeed": ("deepspeed", MODEL, 8, ZERO, DEEPSPEED),
    "litgpt alone": ("litgpt", MODEL, 1, [], LITGPT),
    "litgpt": ("litgpt", MODEL, 8, [], [*LITGPT, "--checkpointing", "full", "--strategy", "fsdp1,reduce_dtype=bf16"]),
}


def answer(capsys, model: str, gpus: int, *options: str) -> dict:
    arguments = ["estimate", model, "--gpus", f"{gpus}xh100-80", "--seq-len", "128", *options, "--json"]
    code = run(arguments)
    out, err = capsys.readouterr()
    assert code in (0, 3), err
    return json.loads(out)


@pytest.mark.parametrize("case", sorted(WRITTEN_OUT))
def test_a_framework_is_its_options_written_out(capsys, case):
    name, model, gpus, more, options = WRITTEN_OUT[case]
    short = answer(capsys, model, gpus, "--framework", name, *more)
    long = answer(capsys, model, gpus, *more, *options)
    del short["assumptions"], long["assumptions"]
    assert short == long


def lines(capsys, name: str, *options: str) -> str:
    return "\n".join(answer(capsys, MODEL, 8, "--framework", name, *options)["assumptions"])


@pytest.mark.parametrize("name", ["hf", "torchtitan", "megatron", "litgpt"])
def test_every_default_is_printed_with_its_source(capsys, name):
    printed = lines(capsys, name)
    run(["frameworks", "--json"])
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["id"] == name]
    assert f"--framework {name}: {row['version']}" in printed
    for default in row["defaults"]:
        if not default["where"]:
            assert f"{default['option']} ({default['source']})" in printed
    for note in row["notes"]:
        assert note["where"] or note["text"] in printed


def test_an_option_that_is_given_wins(capsys):
    found = answer(capsys, MODEL, 8, "--framework", "torchtitan", "--checkpointing", "none", "--optimizer", "sgd")
    assert "checkpoint_ops" not in found["strategies"]
    assert found["training"]["optimizer"]["name"] == "sgd"
    assert not any(line.startswith(("--checkpointing", "--optimizer")) for line in found["assumptions"])


def test_another_data_parallel_strategy_wins(capsys):
    found = answer(capsys, MODEL, 8, "--framework", "hf", "--strategy", "fsdp2")
    assert found["strategies"] == ["fsdp2"]


def test_options_of_the_same_strategy_are_completed(capsys):
    given = ("--strategy", "fsdp2,reduce_dtype=bf16,wrap=layer")
    found = answer(capsys, MODEL, 8, "--framework", "torchtitan", *given)
    assert any(line.startswith("--strategy fsdp2: param_dtype=bf16 (") for line in found["assumptions"])
    assert "wrap=layer+embedding" not in " ".join(found["assumptions"])


def test_zero_switches_clipping_and_no_switches_flags_off(capsys):
    off = ("--clip", "0", "--no-keep-inputs", "--no-items-in-batch")
    training = answer(capsys, MODEL, 1, "--framework", "hf", *off)["training"]
    assert (training["clip"], training["keep_inputs"], training["items_in_batch"]) == (None, False, False)


def test_the_optimizer_goes_with_torch(capsys):
    assert "--optimizer adamw,implementation=foreach" in lines(capsys, "hf", "--torch", "2.7")


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--framework", "hff"], "hf"),
        (["--framework", "deepspeed"], "deepspeed_zero2"),
        (["--framework", "deepspeed", "--gpus", "h100-80"], "8xh100-80"),
        (["--framework", "torchtitan", "--tp", "2"], "--checkpointing full"),
        (["--framework", "litgpt", "--tp", "2"], "--tp"),
        (["--framework", "litgpt", "--task", "pretrain"], "leave 'framework' out"),
    ],
)
def test_what_is_not_modelled_or_known_is_one_line(capsys, options, hint):
    assert run(["estimate", MODEL, "--gpus", "8xh100-80", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert hint in err


def test_a_family_that_the_framework_does_not_have_is_refused(capsys):
    assert run(["estimate", "qwen3-0.6b", "--gpus", "8xh100-80", "--framework", "torchtitan"]) == 2
    assert "torchtitan" in capsys.readouterr().err


def test_frameworks_are_listed(capsys):
    assert run(["frameworks"]) == 0
    out = capsys.readouterr().out
    for name in ("hf", "deepspeed", "torchtitan", "megatron", "litgpt"):
        assert f"{name}: " in out
