"""State space layers, alone or among others: properties of every model, what is read, what is refused."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hardware.errors import UnsupportedError, UsageError
from simulator import Training, simulate
from simulator.reading import read_model, spec_from_class, spec_from_config
from simulator.timeline import moments
from tests.simulator import test_properties as properties
from tests.strategies import hybrid_specs, trainings

some = settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
SMALL = {"hidden_size": 32, "vocab_size": 50, "num_heads": 4, "head_dim": 16, "n_groups": 2, "num_hidden_layers": 2}
HYBRID = {"hidden_size": 32, "vocab_size": 50, "mamba_num_heads": 4, "n_groups": 2}
NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"


@some
@given(hybrid_specs(), trainings(), properties.choices)
def test_fold_is_unroll(model, training, strategies):
    properties.test_fold_is_unroll.hypothesis.inner_test(model, training, strategies)


@some
@given(hybrid_specs(max_layers=12), trainings(), properties.choices)
def test_repeats_stand_for_every_layer(model, training, strategies):
    properties.test_repeats_stand_for_every_layer.hypothesis.inner_test(model, training, strategies)


@some
@given(hybrid_specs(max_layers=4), trainings())
def test_naive_interpreter_agrees(model, training):
    properties.test_naive_interpreter_agrees.hypothesis.inner_test(model, training)


@settings(some, max_examples=8)
@given(
    st.lists(st.sampled_from(("ME", "MEM*E", "M-", "MM*E")), min_size=12, max_size=16), trainings(), properties.choices
)
def test_layers_without_a_period_run_as_if_all_were_built(parts, training, strategies):
    """Step by step, with what each allocates and frees."""
    sizes = {"hidden_size": 16, "vocab_size": 20, "intermediate_size": 24, "moe_intermediate_size": 16, "head_dim": 8}
    keys = sizes | {"mamba_num_heads": 4, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 4, "chunk_size": 8}
    model = spec_from_class("NemotronHConfig", keys | {"hybrid_override_pattern": "".join(parts)}, "m")
    short, long = (properties.report_of(model, training, strategies, unrolled=flag) for flag in (False, True))
    if short is None:
        return
    assert steps(short) == steps(long)


def steps(report):
    """Name, bytes allocated and freed of every step."""
    bindings, found = report.program.bindings, []
    for node in (report.program.load, report.program.cold, report.program.steady):
        for moment in moments(node):
            births, deaths = (
                sum(int(each.storage.size.allocated(bindings)) for each in part)
                for part in (moment.step.births, moment.step.deaths)
            )
            found.append((moment.step.name, births, deaths))
    return found


def test_the_report_says_which_path_is_simulated():
    """Installed kernels would save and allocate something else."""
    assert any("mamba-ssm" in line for line in read_model(NANO).assumptions)


def test_a_pattern_of_letters_is_a_list_of_kinds():
    named = ["linear_attention", "moe", "full_attention", "mlp"]
    kinds = [{"layers_block_type": named}, {"hybrid_override_pattern": "ME*-"}, {"layer_types": named}]
    old = {"layers_block_type": ["mamba", "moe", "attention", "mlp"]}
    read = [spec_from_class("NemotronHConfig", HYBRID | each, "m").layers for each in (*kinds, old)]
    assert read.count(read[0]) == 4


@pytest.mark.parametrize("kinds", [[], ["linear"], "M", 3])
def test_kinds_that_do_not_exist(kinds):
    with pytest.raises(UsageError, match="layers_block_type must be a list of names out of linear_attention, moe"):
        spec_from_class("NemotronHConfig", HYBRID | {"layers_block_type": kinds}, "m")


def test_a_config_has_to_name_its_layers():
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with pytest.raises(UsageError, match=r"layers_block_type .* is missing"):
        spec_from_config({"model_type": "nemotron_h", **HYBRID, **sizes}, "m")


def test_a_model_without_state_space_layers_may_have_groups_of_them():
    """n_groups, which is then not read, is no misspelling of n_group."""
    sizes = {"n_routed_experts": 8, "moe_intermediate_size": 16, "layers_block_type": ["moe"]}
    assert spec_from_class("NemotronHConfig", HYBRID | sizes, "m").layers[0].channel_mixer.experts == 8


def test_widths_must_agree():
    with pytest.raises(UsageError, match="hidden_size x expand must equal num_heads x head_dim, not 32 x 3 and 64"):
        spec_from_class("Mamba2Config", SMALL | {"expand": 3}, "m")
    with pytest.raises(UsageError, match="num_heads must be a multiple of n_groups, not 4 and 3"):
        spec_from_class("Mamba2Config", SMALL | {"n_groups": 3}, "m")


def test_positions_need_attention():
    keys = {"hidden_size": 64, "num_hidden_layers": 2, "position_embedding_type": "rope"}
    with pytest.raises(UsageError, match="needs a layer of kind full_attention"):
        spec_from_class("GraniteMoeHybridConfig", keys, "m")


def test_padding_is_refused_by_name():
    model = spec_from_class("Mamba2Config", SMALL, "m")
    with pytest.raises(UnsupportedError, match="'attention_mask' must be none or full with state space layers"):
        simulate(model, Training(seq_len=8, attention_mask="padded"))


def test_chunks_bound_what_is_kept():
    """Twice the tokens are about twice the bytes that grow with them: scores are of a chunk, not of the sequence."""
    model = spec_from_class("Mamba2Config", SMALL | {"chunk_size": 16}, "m")
    peaks = [simulate(model, Training(seq_len=length)).steady.nbytes for length in (256, 512, 1024)]
    assert peaks[2] - peaks[1] <= 2.1 * (peaks[1] - peaks[0])
