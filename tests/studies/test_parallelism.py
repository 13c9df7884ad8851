"""From the words of the command line to mesh and strategies; wrong ones in one line with the way out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UsageError
from simulator import Mesh
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from strategies.zero_redundancy import partition
from studies.cli.main import run
from studies.parallelism import Degrees, parallelise, parse_strategy


def test_options_reach_the_strategy():
    text = "fsdp2,param_dtype=bf16,reduce_dtype=fp32,reshard_after_forward=2,prefetch=1,sync=last"
    expected = Fsdp2(param_dtype=BF16, reduce_dtype=FP32, reshard_after_forward=2, prefetch=1, sync="last")
    assert parse_strategy(text) == expected
    assert parse_strategy("fsdp2,reshard_after_forward=false,param_dtype=none") == Fsdp2(reshard_after_forward=False)
    assert parse_strategy("ddp,bucket_cap_mb=1e2") == Ddp(bucket_cap_mb=100)


@pytest.mark.parametrize(
    ("texts", "degrees", "world", "mesh"),
    [
        (["fsdp2"], {}, 64, Mesh(dp_shard=64)),
        (["fsdp2"], {"dp_replicate": 4}, 64, Mesh(dp_replicate=4, dp_shard=16)),
        (["fsdp2"], {"dp_shard": 8}, 64, Mesh(dp_replicate=8, dp_shard=8)),
        (["ddp"], {}, 64, Mesh(dp_replicate=64)),
        ([], {}, 1, Mesh()),
    ],
)
def test_what_is_left_goes_to_data_parallelism(texts, degrees, world, mesh):
    assert parallelise(texts, Degrees(**degrees), world)[0] == mesh


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--gpus 8xh100-80", "fsdp2"),
        ("--gpus 8xh100-80 --strategy fsdp2 --tp 3", "nearest that work: 2, 4"),
        ("--gpus 12xh100-80 --strategy fsdp2 --dp-replicate 5", "dp_replicate 5 x dp_shard 2"),
        ("--gpus 8xh100-80 --strategy fsdp2 --dp-shard 16", "nearest that work: 8"),
        ("--gpus 8xh100-80 --strategy fsdp3", "did you mean 'fsdp2'"),
        ("--gpus 8xh100-80 --strategy fsdp2,reshard=false", "did you mean 'reshard_after_forward'"),
        ("--gpus 8xh100-80 --strategy fsdp2,reshard_after_forward=maybe", "true or false or a whole number"),
        ("--gpus 8xh100-80 --strategy fsdp2,reshard_after_forward=3", "use one of 2, 4"),
        ("--gpus 8xh100-80 --strategy fsdp2,param_dtype=int8", "fp32, bf16, fp16 or none"),
        ("--gpus 8xh100-80 --strategy fsdp2,prefetch", "NAME,option=value"),
        ("--gpus 8xh100-80 --strategy fsdp2,prefetch=1,prefetch=2", "once"),
        ("--gpus 8xh100-80 --strategy fsdp2,prefetch=1e400", "whole number"),
        ("--gpus 4xh100-80 --strategy context_parallel --strategy fsdp2", "give --cp 2 or more"),
        ("--gpus 4xh100-80 --strategy fsdp2 --pp 4 --schedule dualpipv", "dualpipev"),
        ("--gpus 2xh100-80 --tp 2 --checkpointing ops --implementation torchtitan", "use full checkpointing"),
        ("--gpus 8xh100-80 --strategy fsdp2 --ep 2", "'ep' changes nothing: this llama has no experts"),
        ("--gpus 8xh100-80 --strategy fsdp2 --tp 0", "from 1 on"),
        ("--gpus h100-80 --strategy fsdp2", "needs several GPUs"),
        ("--gpus 8xh100-80 --strategy fsdp2 --strategy ddp", "both own the weights"),
        ("--gpus 8xh100-80 --strategy ddp --strategy ddp", "once"),
        ("--gpus 8xh100-80 --strategy zero_redundancy", "apply ddp before it"),
        ("--gpus 8xh100-80 --strategy full_checkpointing", "must say how 8 data-parallel ranks"),
        ("--gpus 8xh100-80 --strategy full_checkpointing,x=1", "no option of full_checkpointing named 'x'"),
        ("--gpus 8xh100-80 --strategy fsdp2 --global-batch 12", "8 data-parallel ranks = 8"),
        ("--gpus 8xh100-80 --strategy fsdp2 --optimizer adafactor", "adafactor"),
    ],
)
def test_wrong_words_are_one_line_with_the_way_out(capsys, arguments, said):
    code = run(["estimate", "llama-3.2-1b", *arguments.split()])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert said in error


def test_ranks_that_differ_are_told_apart(capsys):
    words = "--gpus 4xa100-80 --strategy ddp --strategy zero_redundancy --seq-len 8 --json"
    assert run(["estimate", "llama-3.2-1b", *words.split()]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["mesh"] == {"pp": 1, "dp_replicate": 4, "dp_shard": 1, "cp": 1, "tp": 1}
    assert sum(ranks["count"] for ranks in data["ranks"]) == 4
    kept = [ranks["between_steps_bytes"] for ranks in data["ranks"]]
    assert kept == sorted(kept, reverse=True)
    assert data["peak_bytes"] == max(ranks["peak_bytes"] for ranks in data["ranks"])


def test_the_list_of_strategies_names_options_defaults_and_sources(capsys):
    assert run(["strategies", "--json"]) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    options = {option["name"]: option["default"] for option in rows["fsdp2"]["options"]}
    assert options["reshard_after_forward"] == "true"
    assert "fully_shard" in rows["fsdp2"]["source"]
    assert all(row["summary"] and (row["source"] or row["id"] == "loopback") for row in rows.values())
    assert run(["strategies"]) == 0
    assert "gradient_as_bucket_view" in capsys.readouterr().out


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 9))
def test_the_greedy_partition_covers_every_weight_once(elements, ranks):
    """No rank is more than one weight fuller than the emptiest (the bound of greedy list scheduling)."""
    own = partition(elements, ranks)
    assert sorted(index for indices in own for index in indices) == list(range(len(elements)))
    totals = [sum(elements[index] for index in indices) for indices in own]
    assert max(totals) - min(totals) <= max(elements)


@given(st.text(max_size=30))
def test_any_text_is_a_strategy_or_a_usage_error(text):
    try:
        parse_strategy(text)
    except UsageError as error:
        assert "\n" not in str(error).replace(text, "")
