"""The breakdown by place: every byte once, modules named as the model names them."""

from __future__ import annotations

import pytest

from simulator import Training, simulate
from studies.breakdown import ELSEWHERE, by_place


@pytest.mark.parametrize("model", ["gpt2", "llama-3.2-1b", "gemma-2-2b"])
def test_groups_add_up_and_keep_the_order_of_forward(model):
    report = simulate(model, Training(micro_batch=2, seq_len=512, attention="eager"))
    for step in (report.cold, report.steady):
        groups = by_place(report.live(step), report.plan.graph)
        assert sum(group.nbytes for group in groups) == step.nbytes
        layers = [i for g in groups if g.first is not None for i in range(g.first, g.last + 1)]
        assert layers == list(range(len(report.model.layers)))
        places = ["layers" if group.first is not None else group.name for group in groups]
        embedding = next(name for name in places if name.endswith(("wte", "embed_tokens")))
        assert places.index(embedding) < places.index("layers")
        if "loss_function" in places:
            assert places.index("layers") < places.index("loss_function")
        assert places.count(ELSEWHERE) <= 1


def test_alternating_layers_are_not_thrown_together():
    """Only neighbours that hold the same bytes share a row, so the last layer's extra tensors are seen."""
    report = simulate("gemma-2-2b", Training(seq_len=64, attention="eager"))
    for left, right in zip(groups := by_place(report.live(), report.plan.graph), groups[1:], strict=False):
        if left.first is not None and right.first is not None:
            assert left.nbytes_each != right.nbytes_each
            assert left.last + 1 == right.first
