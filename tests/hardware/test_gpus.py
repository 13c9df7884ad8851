"""The GPU catalogue through its public surface."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware.errors import UnsupportedError, UsageError
from hardware.gpus import SEEN_OF_NVIDIA_SMI, SEEN_OF_VENDOR, Capacity, Gpu, all_gpus, gpu, gpus
from hardware.registry import Registry
from hardware.tables import Band, read_table
from hardware.units import GB, GIB, MIB

REFERENCE = Path(__file__).parents[3] / "shared" / "reference" / "gpus.csv"
NAMES = [card.name for card in all_gpus()]


@pytest.mark.parametrize("name", NAMES)
def test_every_gpu_has_a_positive_capacity_with_evidence(name):
    capacity = gpu(name).capacity
    assert 0 < capacity.low <= capacity.high
    assert capacity.evidence
    assert capacity.evidence.startswith("assumed") == (capacity.basis != "framework")


@pytest.mark.parametrize("name", NAMES)
def test_every_gpu_names_its_source_and_confidence(name):
    card = gpu(name)
    assert card.source
    assert card.confidence in {"high", "good", "partly", "low"}


@given(st.sampled_from(all_gpus()), st.data())
def test_names_round_trip_in_any_case_and_by_any_alias(card, data):
    spelling = data.draw(st.sampled_from([card.name, card.product, *card.aliases]))
    cased = data.draw(st.sampled_from([str.upper, str.lower, str.title]))(spelling)
    assert gpu(f" {cased} ") is card


def test_no_two_gpus_share_a_spelling():
    spellings = [s.lower() for card in all_gpus() for s in {card.name, card.product.lower(), *card.aliases}]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA RTX A6000", "a6000"),
        ("Tesla V100-SXM2-32GB", "v100-32"),
        ("Tesla T4", "t4"),
    ],
)
def test_the_name_torch_gives_a_device_is_known(device_name, name):
    assert gpu(device_name).name == name


@pytest.mark.parametrize(("typed", "meant"), [("a100", "a100-80"), ("h1000", "h100-80"), ("rtx4091", "rtx4090")])
def test_a_near_miss_gets_a_suggestion(typed, meant):
    with pytest.raises(UsageError, match=f"no GPU named '{typed}'; did you mean .*'{meant}'"):
        gpu(typed)


def test_rates_are_dense_operations_per_second():
    assert gpu("a100-80").flops("bf16") == Band(312 * 10**12, 312 * 10**12)
    assert gpu("a100-80").flops("fp16") == gpu("a100-80").flops("bf16")
    assert gpu("v100-32").flops("fp16") == Band(112 * 10**12, 125 * 10**12)


def test_an_unknown_rate_is_refused_and_never_guessed():
    with pytest.raises(UnsupportedError, match="'bf16' rate of GPU 't4'; rates known: fp32, fp16, int8"):
        gpu("t4").flops("bf16")


def test_the_framework_sees_no_more_than_nvidia_smi_and_no_less_than_we_assume_elsewhere():
    for row in reported("nvidia_smi_MiB"):
        total = int(row["nvidia_smi_MiB"]) * MIB
        assert total * SEEN_OF_NVIDIA_SMI // 1000 <= int(row["capacity_low_bytes"]), row["name"]
        assert int(row["capacity_high_bytes"]) <= total, row["name"]


def test_the_framework_sees_at_least_what_we_assume_of_the_vendors_figure():
    for row in reported("spec_GB"):
        nominal = int(row["spec_GB"])
        assert nominal * GB * SEEN_OF_VENDOR // 1000 <= int(row["capacity_low_bytes"]), row["name"]
        assert int(row["capacity_high_bytes"]) <= nominal * GIB, row["name"]


def test_a_capacity_nobody_reports_is_inferred_and_says_from_what():
    assert "nvidia-smi" in gpu("gb200").capacity.evidence
    assert "vendor's 256 GB" in gpu("mi325x").capacity.evidence


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2, 1), (-1, 1)])
def test_an_impossible_capacity_is_refused(low, high):
    with pytest.raises(ValueError, match="0 < low <= high"):
        Capacity(low, high, "given", "")
    with pytest.raises(ValueError, match="0 < low <= high"):
        Band(low, high)


def test_importing_the_catalogue_reads_no_table_and_no_heavy_library():
    heavy = "numpy sympy matplotlib networkx rich importlib.metadata importlib.resources"
    code = f"import hardware.gpus, hardware.cluster, sys; print(*(m for m in {heavy.split()} if m in sys.modules))"
    # -S: what site-packages' own start-up hooks import is not ours; so attrs' place is handed in.
    import attrs

    code = f"import sys; sys.path.append({str(Path(attrs.__file__).parents[1])!r}); " + code
    out = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


def reported(column: str) -> list[dict[str, str]]:
    return [dict(row) for row in read_table("gpus.csv") if row["capacity_low_bytes"] and row[column]]


# Plug-ins


def card(name: str) -> Gpu:
    return Gpu(name, Capacity(GIB, GIB, "framework", "a test's"))


@pytest.fixture
def catalogue(monkeypatch) -> Iterator[Registry[Gpu]]:
    """A registry with one own card, and entry points that load, fail and collide."""
    points = [
        EntryPoint("good", "tests_plugin:good", "tests.gpus"),
        EntryPoint("broken", "no_such_module:card", "tests.gpus"),
        EntryPoint("own", "tests_plugin:own", "tests.gpus"),
    ]
    module = type(sys)("tests_plugin")
    module.good, module.own = card("good"), card("own")
    monkeypatch.setitem(sys.modules, "tests_plugin", module)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [p for p in points if p.group == group])
    return Registry("GPU", "tests.gpus", builtin=lambda: {"own": card("own")})


def test_our_own_names_are_found_without_loading_a_plug_in(catalogue, recwarn):
    assert catalogue.get("own").name == "own"
    assert not recwarn.list


def test_a_plug_in_joins_and_a_broken_one_is_skipped_with_its_name(catalogue):
    with pytest.warns(UserWarning, match="plug-in") as caught:
        assert catalogue.get("good").name == "good"
    texts = [str(w.message) for w in caught]
    assert any(re.search("'broken' failed to load and is skipped: No module named 'no_such_module'", t) for t in texts)
    assert any("'own' hides behind one of the same name" in t for t in texts)
    assert catalogue.names() == ["good", "own"]


def test_a_missing_name_is_an_error_even_when_plug_ins_fail(catalogue):
    with (
        pytest.warns(UserWarning, match="plug-in"),
        pytest.raises(UsageError, match="no GPU named 'god'; did you mean 'good'"),
    ):
        catalogue.get("god")


def test_a_taken_name_cannot_be_registered_again():
    with pytest.raises(ValueError, match="GPU 'a100-80' is registered already"):
        gpus.add("a100-80", card("a100-80"))


# The numbers


def source_rows() -> list[dict[str, str]]:
    if not REFERENCE.exists():
        pytest.skip("the source tables are not beside the checkout")
    with REFERENCE.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


# Per device instead of per card, or one row split in two: checked by hand.
SPLIT = {"MI250X-128GB", "GH200-96/144GB"}


def source_pairs() -> list[tuple[dict[str, str], Gpu]]:
    return [(row, gpu(row["id"])) for row in source_rows() if row["id"] not in SPLIT]


def test_every_source_row_is_in_the_catalogue():
    assert {row["id"] for row in source_rows()} - SPLIT <= {card.product for card in all_gpus()}
    assert gpu("mi250x").capacity.low == 64 * GIB
    assert gpu("gh200-96").bandwidth == Band(4000 * GB, 4000 * GB)
    assert gpu("gh200-144").bandwidth == Band(4800 * GB, 4800 * GB)


def test_bandwidths_are_the_sources():
    for row, card in source_pairs():
        found = numbers(row["mem_bw_GBps"].replace("-", " "))
        assert card.bandwidth == Band(round(found[0] * GB), round(found[-1] * GB)), card.name


@pytest.mark.parametrize(
    ("dtype", "column"),
    [
        ("fp32", "fp32_TF"),
        ("tf32", "tf32_TF"),
        ("bf16", "bf16_dense_TF"),
        ("fp8", "fp8_dense_TF"),
        ("int8", "int8_dense_TOPS"),
        ("fp4", "fp4_dense_TF"),
    ],
)
def test_rates_come_from_the_source(dtype, column):
    for row, card in source_pairs():
        text = row[column]
        rates = dict(card.rates)
        known = bool(text) and not text.startswith("n/a")
        assert (dtype in rates) == known, card.name
        if known:
            ends = {round(end / 1e12, 3) for end in (rates[dtype].low, rates[dtype].high)}
            assert ends & set(numbers(text.replace("-", " "))), card.name


def test_measured_capacities_contain_the_sources_figure():
    for row, card in source_pairs():
        figures = numbers(row["usable_bytes_framework"].replace("-", " "))
        for figure in figures:
            # Some figures were rounded to megabytes, ours to a hundredth of a GiB.
            assert card.capacity.low * 0.999 <= figure <= card.capacity.high * 1.001, card.name


def test_speeds_of_links_are_the_sources():
    for row, card in source_pairs():
        figures = numbers(row["link_GBps_per_dir_per_gpu"])
        if card.link and figures:
            reachable = {card.link.bandwidth.low, card.link.per_peer}
            assert {round(figure * GB) for figure in figures} & reachable, card.name
