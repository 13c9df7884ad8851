"""Split backward through stages whose last layer adds up gradients otherwise than those before it."""

import attrs
import pytest

from simulator import Mesh, Training, simulate
from simulator.reading import read_model
from strategies.pipeline_schedule import PipelineSchedule

WHOLE = read_model("qwen3-30b-a3b")
MODEL = attrs.evolve(WHOLE, layers=WHOLE.layers[:12])


@pytest.mark.parametrize("schedule", ["zb_h1", "zbv", "dualpipev"])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_alive_at_the_peak_has_a_name(schedule, rank):
    training = Training(seq_len=48, gradient_accumulation=4)
    report = simulate(MODEL, training, [PipelineSchedule(schedule=schedule, rank=rank)], mesh=Mesh(pp=2))
    for step in (report.cold, report.steady):
        assert sum(live.nbytes for live in report.live(step)) == step.nbytes
