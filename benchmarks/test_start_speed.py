"""Time from process start: help under 0.3 s, a first estimate under 0.8 s.

Run with ``python -m pytest benchmarks --benchmark-enable``.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = {"help": ["--help"], "estimate": ["estimate", "gpt2", "--gpus", "a100-80", "--dtype", "bf16"]}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_from_process_start(benchmark, name):
    command = [sys.executable, "-c", "from studies.cli.main import main; main()", *COMMANDS[name]]
    result = benchmark.pedantic(
        lambda: subprocess.run(command, capture_output=True, check=True), rounds=5, iterations=1
    )
    assert result.stdout
