"""The example of docs/extending.md works as printed; a plug-in is found through its entry point."""

from __future__ import annotations

import re
from pathlib import Path

from hardware.dtypes import FP32
from simulator import Mesh, Training, simulate
from simulator.roles import Role
from strategies import strategies
from strategies.contract import StrategyContract
from strategies.fsdp2 import Fsdp2
from tests.strategies import uniform_llama

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
EXAMPLE = re.search(r"<!-- example -->\n```python\n(.*?)```", TEXT, re.DOTALL)
namespace: dict = {"__name__": "example"}
exec(compile(EXAMPLE[1], "docs/extending.md", "exec"), namespace)
Ema = namespace["Ema"]


class TestExample(StrategyContract):
    strategy = Ema(dtype=FP32)


class TestExampleOnShards(StrategyContract):
    strategy = Ema()
    mesh = Mesh(dp_shard=4)
    before = (Fsdp2(),)
    axis = "dp_shard"


class TestLoopback(StrategyContract):
    strategy = strategies.get("loopback")(mebibytes=3)


def test_the_example_averages_what_the_rank_keeps():
    mesh, training = Mesh(dp_shard=4), Training(seq_len=16)
    peaks = [
        simulate(uniform_llama(5), training, [Fsdp2(), *more], mesh=mesh).steady.by_role for more in ((), (Ema(),))
    ]
    assert peaks[1][Role.MASTER_WEIGHT] == peaks[1][Role.PARAMETER] == peaks[0][Role.PARAMETER]


def test_a_plug_in_is_found_and_does_what_it_says():
    assert "loopback" in strategies.names()
    plain, more = (
        simulate(uniform_llama(5), Training(seq_len=1), s) for s in ((), [strategies.get("loopback")(mebibytes=64)])
    )
    assert more.steady.by_role[Role.BUCKET] == 64 * 2**20
    assert more.steady.end_bytes == plain.steady.end_bytes
