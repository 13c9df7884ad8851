"""Host memory of ranks and nodes against real PyTorch code: what torch puts there when weights are offloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardware.cluster import parse_cluster
from hardware.errors import UnsupportedError
from simulator import Mesh, Training, simulate
from simulator.host import HostMemory, fullest_node
from strategies.contract import StrategyContract
from strategies.fsdp1 import Fsdp1
from strategies.fsdp2 import Fsdp2
from studies.estimate import estimate
from studies.options import TrainingOptions
from studies.validation import validate_oracle
from studies.validation.distributed import distributed_case
from tests.strategies import uniform_llama

OWN = Path(__file__).parents[1] / "data" / "oracle" / "offload_host.jsonl"
LINES = [json.loads(line) for line in OWN.read_text().splitlines()]


class TestOffloadedFsdp2(StrategyContract):
    strategy = Fsdp2(offload=True)
    mesh = Mesh(dp_shard=4)


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["name"])
def test_bytes_in_host_memory(line):
    """Weights, gradients and states when backward has ended, before they go."""
    case = distributed_case(line)
    host = simulate(case.model, case.training, case.strategies, mesh=case.mesh, rank=case.rank).host
    assert host.nbytes == sum(line["host"]["bwd"].values())
    assert host.pageable == line["host"]["bwd"].get("optimizer_state", 0)


def test_peaks_on_the_device():
    errors = [row.error_pct for row in validate_oracle(OWN).rows]
    assert errors == [0] * 2 * len(LINES)


def test_memory_that_is_not_pinned():
    pinned, pageable = (
        simulate(uniform_llama(2), Training(seq_len=4), [Fsdp2(offload=True, pin_memory=pin)]).host
        for pin in (True, False)
    )
    assert pinned.nbytes == pageable.nbytes
    assert pinned.pinned > 0 == pageable.pinned


def test_a_node_has_the_ranks_that_keep_the_most():
    high, low = HostMemory(pinned=5), HostMemory(pageable=3, nvme=1)
    assert fullest_node([(low, 6), (high, 2)], 4) == HostMemory(pinned=10, pageable=6, nvme=2)
    assert fullest_node([(low, 1)], 1) == low


@pytest.mark.parametrize(("gpus", "node"), [("16xh100-80", 8), ("2xh100-80", 2), ("12x24GiB", 8)])
def test_hosts_of_an_estimate(gpus, node):
    options = TrainingOptions(seq_len=16, strategy=("fsdp2,offload=true",))
    found = estimate(uniform_llama(2), gpus, options).to_json_dict()
    assert parse_cluster(gpus).node_gpus == node
    assert (found["node_gpus"], found["node_host_bytes"]) == (node, node * found["host_bytes"])
    assert found["node_host_pinned_bytes"] == node * found["host_pinned_bytes"] > 0


def test_offloaded_flat_parameters_are_refused():
    with pytest.raises(UnsupportedError, match="'cpu_offload' params is not modelled yet"):
        Fsdp1(cpu_offload="params")
