"""Structured pruning: a pruned model is the model of its own sizes, however it came about."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hardware.dtypes import BF16
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.model import FeedForwardSpec, LayerSpec
from simulator.plan import Plan, apply, make_plan
from simulator.reading import read_model, spec_from_config
from strategies.checkpointing import FullCheckpointing
from strategies.contract import StrategyContract
from strategies.ddp import Ddp
from strategies.fsdp2 import Fsdp2
from strategies.pruning import PruneChannels, PruneExperts, PruneGroups, PruneHeads, PruneHidden, PruneLayers, prunings
from studies.validation import oracle_case, read_cases, validate_oracle
from tests.strategies import model_specs, trainings, uniform_llama

RECORDED = Path(__file__).parents[1] / "data" / "oracle" / "pruning.jsonl"
#: Families whose config names heads, their channels, keys and width one by one.
CONFIGURED = ("gemma2", "llama", "mistral", "qwen3")


class TestPruneHeads(StrategyContract):
    strategy = PruneHeads(2)


class TestPruneGroups(StrategyContract):
    strategy = PruneGroups("50%")


class TestPruneChannels(StrategyContract):
    strategy = PruneChannels("30%", (0,))


class TestPruneHidden(StrategyContract):
    strategy = PruneHidden("25%")


class TestPruneLayers(StrategyContract):
    strategy = PruneLayers((1,))

    def plans(self, mesh: Mesh | None = None, *, unrolled: bool = False) -> Iterator[Plan]:
        """Plans of models that have a second layer."""
        return (plan for plan in super().plans(mesh, unrolled=unrolled) if len(plan.model.layers) > 1)


# against real models, some of whose linear layers were cut ------------------------------------------------------------


def test_peaks_of_real_models_with_fewer_heads_channels_and_layers():
    rows = validate_oracle(RECORDED).rows
    assert [row.name for row in rows if row.error_pct != 0] == []
    assert [row.name for row in rows if row.phase_expected != row.phase_simulated] == []


@pytest.mark.parametrize("line", list(read_cases(RECORDED)), ids=lambda line: line["id"])
def test_parameters_of_real_models(line):
    assert simulate(*oracle_case(line)).parameters == line["params_total"]


# against the model of these sizes -------------------------------------------------------------------------------------


def config(family, heads=8, kv_heads=4, width=96, layers=4, hidden=48):
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8, "hidden_size": hidden}
    more = {"intermediate_size": width, "num_hidden_layers": layers, "vocab_size": 130}
    more |= {"layer_types": ["full_attention"] * layers} if family == "gemma2" else {}
    return {"model_type": family, **sizes, **more, "max_position_embeddings": 64, "sliding_window": 32}


def found(model, strategies, training):
    report = simulate(model, training, strategies)
    return [(s.nbytes, s.by_role, s.phase, s.end_bytes) for s in (report.cold, report.steady)], report.parameters


@settings(max_examples=15)
@given(
    family=st.sampled_from(CONFIGURED),
    per_group=st.integers(0, 1),
    groups=st.integers(0, 3),
    channels=st.integers(0, 95),
    hidden=st.sampled_from([0, 24]),
    gone=st.sets(st.integers(0, 3), max_size=3),
    training=trainings(),
)
def test_a_pruned_model_is_the_model_of_its_config(family, per_group, groups, channels, hidden, gone, training):
    """Built from a config with fewer heads, channels and layers, it needs the same memory at every peak."""
    pruning = [PruneHeads(4 * per_group)] if per_group else []
    pruning += [PruneGroups(groups)] if groups else []
    pruning += [PruneChannels(channels)] if channels else []
    pruning += [PruneHidden(hidden)] if hidden else []
    pruning += [PruneLayers(tuple(gone))] if gone else []
    kv_heads = 4 - groups
    smaller = config(family, kv_heads * (2 - per_group), kv_heads, 96 - channels, 4 - len(gone), 48 - hidden)
    try:
        built = found(spec_from_config(smaller, "smaller"), [], training)
    except UnsupportedError:
        assume(False)
    assert found(spec_from_config(config(family), "whole"), pruning, training) == built


@settings(max_examples=15)
@given(model=model_specs(), training=trainings(), data=st.data())
def test_pruning_more_never_needs_more(model, training, data):
    """Channels and layers may go in any number; parameters and both peaks only fall."""
    layer = data.draw(st.integers(0, len(model.layers) - 1))
    width = model.layers[layer].feed_forward.width
    few, more = sorted(data.draw(st.tuples(st.integers(0, width - 1), st.integers(0, width - 1))))
    steps = [[], [PruneChannels(few, (layer,))] if few else [], [PruneChannels(more, (layer,))] if more else []]
    try:
        reports = [simulate(model, training, pruning) for pruning in steps]
    except UnsupportedError:
        assume(False)
    for read in (lambda r: r.cold.nbytes, lambda r: r.steady.nbytes, lambda r: r.parameters):
        whole, less, least = map(read, reports)
        assert whole >= less >= least


@pytest.mark.parametrize("family", CONFIGURED)
def test_every_layer_may_keep_another_number_of_heads(family):
    model = spec_from_config(config(family), "whole")
    strategies = [PruneHeads(4, (1,)), PruneGroups(3, (2,)), PruneGroups(1, (3,))]
    report = simulate(model, Training(micro_batch=2, seq_len=16, weights=BF16, attention="eager"), strategies)
    assert [layer.attention.heads for layer in report.model.layers] == [8, 4, 2, 6]
    assert [layer.attention.kv_heads for layer in report.model.layers] == [4, 4, 1, 3]


def test_experts_and_their_channels():
    model = moe()
    report = simulate(model, Training(seq_len=8), [PruneExperts(2), PruneChannels("25%")])
    assert {layer.feed_forward.experts for layer in report.model.layers} == {6}
    assert {layer.feed_forward.width for layer in report.model.layers} == {12}
    assert simulate(model, Training(seq_len=8)).parameters > report.parameters


SIZES = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 77}
EXPERTS = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 56, "q_lora_rank": 80, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 32}
ROUTED = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 72}
OTHERS = {
    "mixtral": {**EXPERTS, "num_local_experts": 8},
    "qwen3_moe": {**EXPERTS, "num_experts": 8, "moe_intermediate_size": 56},
    "deepseek_v3": {
        **SIZES,
        **LATENT,
        **ROUTED,
        "num_key_value_heads": 6,
        "intermediate_size": 320,
        "first_k_dense_replace": 1,
    },
    "gpt_neox": {**SIZES, "intermediate_size": 160},
}


@pytest.mark.parametrize(
    ("family", "smaller", "pruning"),
    [
        ("mixtral", {"num_local_experts": 5}, PruneExperts(3)),
        ("mixtral", {"intermediate_size": 128}, PruneChannels("20%")),
        ("qwen3_moe", {"num_attention_heads": 4}, PruneHeads(2)),
        ("deepseek_v3", {"num_attention_heads": 4, "num_key_value_heads": 4}, PruneHeads(2)),
        ("deepseek_v3", {"n_routed_experts": 6}, PruneExperts("25%")),
        ("gpt_neox", {"intermediate_size": 120}, PruneChannels(40)),
    ],
)
def test_other_families_pruned_are_those_of_their_configs(family, smaller, pruning):
    whole = {"model_type": family, **OTHERS[family]}
    training = Training(micro_batch=2, seq_len=16, weights=BF16, attention="eager")
    built = found(spec_from_config({**whole, **smaller}, "smaller"), [], training)
    assert found(spec_from_config(whole, "whole"), [pruning], training) == built


def moe(**options):
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 16}
    more = {"num_hidden_layers": 2, "vocab_size": 64, "num_local_experts": 8, "num_experts_per_tok": 2}
    return spec_from_config({"model_type": "mixtral", **sizes, **more, **options}, "experts")


# with other techniques ------------------------------------------------------------------------------------------------


def test_what_is_recomputed_stays_with_the_layers_that_are_left():
    orders = ((PruneLayers((0, 3)), FullCheckpointing()), (FullCheckpointing(), PruneLayers((0, 3))))
    one, other = (simulate(uniform_llama(5), Training(seq_len=32), order) for order in orders)
    assert one.steady.by_role == other.steady.by_role
    assert len(other.plan.recomputed) == 3


@pytest.mark.parametrize("owner", [Ddp(), Fsdp2()])
def test_sharding_works_on_what_is_left(owner):
    mesh = Mesh(**{owner.axis: 2})
    pruned = simulate(uniform_llama(4), Training(seq_len=16), [PruneHeads(2), owner], mesh=mesh)
    whole = simulate(uniform_llama(4), Training(seq_len=16), [owner], mesh=mesh)
    assert pruned.peak.nbytes < whole.peak.nbytes
    with pytest.raises(UsageError, match="prune_heads must come before strategies that own the weights"):
        simulate(uniform_llama(4), Training(seq_len=16), [owner, PruneHeads(2)], mesh=mesh)


# refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "problem"),
    [
        (PruneHeads(3), "'heads' to prune must be a multiple of 2, not 3 of 4: remove 2"),
        (PruneHeads(4), "'heads' to prune must be from 1 on, fewer than the 4 there are: 4"),
        (PruneHeads("10%"), r"'heads' to prune must be from 1 on, fewer than the 4 there are: 0 \(10%\)"),
        (PruneGroups(2), "'groups' to prune must be from 1 on, fewer than the 2 there are: 2"),
        (PruneChannels(48), "'channels' to prune must be from 1 on, fewer than the 48 there are"),
        (PruneLayers((2,)), "'layers' to prune must be from 0 to 1 in uniform, not 2"),
        (PruneLayers((0, 1)), "'layers' to prune must leave at least one of 2"),
        (PruneExperts(1), "prune_experts: llama uniform has no experts"),
    ],
)
def test_what_does_not_go_is_refused(strategy, problem):
    with pytest.raises(UsageError, match=problem):
        simulate(uniform_llama(2), Training(seq_len=8), [strategy])


@pytest.mark.parametrize("amount", [0, -1, True, "0", "0%", "100%", "25", "x", "1.5", None, ""])
def test_amounts(amount):
    if amount == "25":
        assert PruneHeads(amount) == PruneHeads(25)
    else:
        with pytest.raises(UsageError, match="an amount to prune must be a whole number"):
            PruneHeads(amount)


def test_more_refusals():
    with pytest.raises(UsageError, match="per_token must be at most experts"):
        simulate(moe(), Training(seq_len=8), [PruneExperts(7)])
    with pytest.raises(UsageError, match="indices from 0 on"):
        PruneLayers(())
    with pytest.raises(UnsupportedError, match="implementation 'transformers' only, not 'torchtitan'"):
        simulate(uniform_llama(2), Training(seq_len=8, implementation="torchtitan"), [PruneHeads(2)])
    with pytest.raises(UnsupportedError, match="'heads' must be as many in every layer of bloom"):
        simulate(read_model("bloom-560m"), Training(seq_len=8, attention="eager"), [PruneHeads(2, (0,))])


def test_a_layer_without_what_is_pruned():
    """Hybrids have layers of one half: they are passed over, unless they are named."""
    model = uniform_llama(2)
    without = attrs.evolve(model, layers=(LayerSpec(None, FeedForwardSpec(width=48)), *model.layers))
    plan = apply(make_plan(without, Training(seq_len=8)), [PruneHeads(2)])
    assert [layer.attention.heads for layer in plan.model.layers[1:]] == [2, 2]
    with pytest.raises(UnsupportedError, match="layer 0 of llama uniform has no attention heads"):
        apply(make_plan(without, Training(seq_len=8)), [PruneHeads(2, (0,))])


def test_the_registry_names_what_can_be_pruned():
    assert {"channels", "experts", "groups", "heads", "hidden", "layers"} <= set(prunings.names())
