"""torchtune's Llama: what tells its memory from that of the same model in transformers."""

from __future__ import annotations

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.dtypes import BF16, FP32
from hardware.errors import UnsupportedError, UsageError
from simulator import Mesh, Training, simulate
from simulator.reading import spec_from_class
from simulator.roles import Role
from strategies.checkpointing import FullCheckpointing
from strategies.tensor_parallel import TensorParallel

SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 208}
SIZES |= {"num_hidden_layers": 3, "vocab_size": 517, "max_position_embeddings": 160}


def model(**others):
    return spec_from_class("LlamaConfig", {**SIZES, **others}, "tiny")


def training(**options):
    return Training(**{"implementation": "torchtune", "micro_batch": 2, "seq_len": 40, "weights": BF16, **options})


@given(
    st.sampled_from([("flex_attention", BF16), ("sdpa", BF16), ("sdpa", FP32)]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([5, 17, 40]),
    st.sampled_from(["default", "chunked", "chunked_compiled"]),
    st.booleans(),
    st.booleans(),
)
def test_the_fold_meets_the_timeline_and_nothing_is_left(how, batch, length, loss, tied, checkpointed):
    """Every step ends as it began, and the peak is the highest point of the unrolled program."""
    attention, dtype = how
    asked = training(attention=attention, weights=dtype, micro_batch=batch, seq_len=length, loss=loss)
    report = simulate(model(tie_word_embeddings=tied), asked, [FullCheckpointing()] * checkpointed)
    assert report.steady.start_bytes == report.steady.end_bytes
    assert report.peak.nbytes == report.timeline(None).total.max()
    assert report.peak.nbytes == sum(live.nbytes for live in report.live())


def test_parameters_are_those_of_transformers():
    others = training(implementation="transformers", attention="sdpa")
    assert simulate(model(), training()).parameters == simulate(model(), others).parameters


def saved(report, label):
    return [live for live in report.live() if live.identity[1] == 1 and label in live.identity[0]]


def test_keys_and_values_are_kept_for_every_query_head():
    """Expanded copies of grouped keys and values, which a model without groups does not have."""
    asked = training(attention="flex_attention", seq_len=160)
    grouped, plain = simulate(model(), asked), simulate(model(num_key_value_heads=6), asked)
    copies = saved(grouped, "attn.clone")
    assert [live.nbytes for live in copies] == [2 * 160 * 2 * 96] * 2
    assert saved(plain, "attn.clone") == []


def test_packed_data_gathers_rotary_tables_at_every_call():
    packed = simulate(model(), training(attention="flex_attention", seq_len=160))
    tables = saved(packed, "pos_embeddings.index")
    assert [live.nbytes for live in tables] == [2 * 160 * 16 * 4] * 2
    assert saved(simulate(model(), training(seq_len=160)), "pos_embeddings.index") == []


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_other_attention_is_refused(attention):
    with pytest.raises(UnsupportedError, match="attention"):
        simulate(model(), training(attention=attention))


@pytest.mark.parametrize("implementation", ["transformers", "torchtitan", "megatron"])
def test_flex_attention_is_refused_elsewhere(implementation):
    with pytest.raises(UnsupportedError, match="attention"):
        simulate(model(), attrs.evolve(training(attention="flex_attention"), implementation=implementation))


def test_tensor_parallelism_is_refused():
    """torchtune's own plan of it was not compared yet."""
    with pytest.raises(UnsupportedError, match="torchtune"):
        simulate(model(), training(), [TensorParallel()], mesh=Mesh(tp=2))


def logits_of(report):
    """Bytes of what the loss head holds at the peak that is as wide as the vocabulary."""
    rows = 2 * 160 * 517
    return sum(live.nbytes for live in report.live() if live.storage.role is Role.LOSS_HEAD) / rows


def test_chunks_of_logits_are_upcast_one_by_one():
    """Whole and compiled chunks: 4 bytes of log-probabilities, or 2 of logits, per logit while backward begins."""
    whole, compiled = (simulate(model(), training(seq_len=160, loss=loss)) for loss in ("default", "chunked_compiled"))
    assert logits_of(whole) == pytest.approx(4, rel=0.02)
    assert logits_of(compiled) <= 2.1
    assert compiled.peak.nbytes < whole.peak.nbytes


@pytest.mark.parametrize("implementation", ["transformers", "torchtitan", "megatron"])
def test_the_chunked_loss_is_torchtunes_alone(implementation):
    with pytest.raises(UsageError, match="'loss' chunked"):
        training(implementation=implementation, loss="chunked")
