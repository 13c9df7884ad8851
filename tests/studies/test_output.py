"""What leaves the process: text and JSON on standard output, errors cut to one line, files on request only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from studies.cli.main import LONGEST_ERROR, run
from studies.cli.output import size

ROOT = Path(__file__).parents[2]
COMMAND = "from studies.cli.main import main; main()"


def vramsim(*arguments, **options):
    """The command in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, check=False, **options,
    )  # fmt: skip


def test_the_process_leaves_with_the_verdict():
    done = vramsim("estimate", "gpt2", "--gpus", "64MiB", "--seq-len", "8", "--json")
    assert done.returncode == 3
    assert done.stderr == ""
    data = json.loads(done.stdout)
    assert data["fits"] is False
    assert data["headroom_bytes"] < 0


def test_every_byte_count_of_the_json_is_an_int_and_says_so():
    data = json.loads(vramsim("estimate", "gpt2", "--gpus", "a100-80", "--seq-len", "8", "--json").stdout)
    assert data["schema_version"] == 1
    counts = dict(_numbers(data))
    known = {"schema_version", "exit_code", "count", "layer", "params", "layers", "hidden", "vocab"}
    known |= {"micro_batch", "seq_len", "gradient_accumulation", "momentum", "weight_decay"}
    known |= {"expert_imbalance", "multiprocessors", "rank", "mtp", "mtp_modules", "mtp_params"}
    known |= {"dp_replicate", "dp_shard", "cp", "pp", "tp", "node_gpus"}
    assert {name for name in counts if "bytes" not in name} <= known
    assert all(type(value) is int for name, value in counts.items() if "bytes" in name)


def _numbers(data, name=""):
    """(name of the nearest key that speaks of bytes, or of the key itself; number) of every number in `data`."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from _numbers(value, name if "bytes" in name else key)
    elif isinstance(data, list):
        for value in data:
            yield from _numbers(value, name)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield name, data


def test_a_reader_that_leaves_early_does_not_change_the_exit_code():
    script = f"{sys.executable} -c '{COMMAND}' gpus --json | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["[", "0"]
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["-h"], ["estimate", "-h"], ["validate", "oracle", "-h"], []])
def test_help_is_short_and_long(capsys, arguments):
    assert run(arguments or ["--help"]) == 0
    assert "Usage: vramsim" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["validate"], ["estimate", "gpt2", "--gpus", "t4", "--micro-batch", "9" * 5000]])
def test_even_odd_errors_are_one_line_of_bounded_length(capsys, arguments):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert len(captured.err) < LONGEST_ERROR + 50


def test_a_peak_beyond_64_bits_is_a_number_but_no_drawing(capsys, tmp_path):
    huge = ["estimate", "llama-3.2-1b", "--gpus", "t4", "--micro-batch", str(2**20), "--seq-len", str(2**24)]
    assert run([*huge, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["peak_bytes"] > 2**63
    target = tmp_path / "timeline.png"
    assert run([*huge, "--plot", str(target)]) == 2
    assert "plot" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is imitated by /dev/full")
@pytest.mark.parametrize("format_", [[], ["--json"]])
def test_output_that_cannot_be_written_is_one_line(format_):
    with Path("/dev/full").open("w") as full:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", COMMAND, "gpus", *format_]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output cannot be written")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_every_format_of_a_plot(capsys, tmp_path, suffix):
    target = tmp_path / f"timeline{suffix}"
    assert run(["estimate", "gpt2", "--gpus", "t4", "--seq-len", "8", "--plot", str(target)]) == 0
    assert target.stat().st_size > 1000


def test_sizes_never_read_zero():
    assert [size(n) for n in (2**30, 2**29, 2**20, 512)] == ["1.00 GiB", "0.50 GiB", "1.0 MiB", "512 B"]
