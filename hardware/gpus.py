"""GPUs by the short name people type, with the capacity a framework sees."""

from __future__ import annotations

from functools import cache
from typing import Literal

import attrs

from hardware.errors import UnsupportedError
from hardware.links import Link, link
from hardware.registry import Registry
from hardware.tables import Band, Row, read_band, read_table
from hardware.units import GB, GIB, MIB

TERA = 10**12

#: What a capacity rests on, from best to worst; "given" is one the user typed.
Basis = Literal["framework", "nvidia-smi", "vendor", "given"]

#: Thousandths of nvidia-smi's total that a framework sees at least: the lowest ratio in data/gpus.csv (RTX 4060 8 GB).
SEEN_OF_NVIDIA_SMI = 968
#: Thousandths of the vendor's decimal GB that a framework sees at least: the lowest is 977 (T4, ECC on), rounded down.
SEEN_OF_VENDOR = 970

_RATES = {  # short dtype name: unit of its columns
    "fp32": "TFLOPS",
    "tf32": "TFLOPS",
    "fp16": "TFLOPS",
    "bf16": "TFLOPS",
    "fp8": "TFLOPS",
    "int8": "TOPS",
    "fp4": "TFLOPS",
}
#: What torch.cuda.get_device_name() puts before the product.
_PREFIXES = ("nvidia-", "amd-", "tesla-", "geforce-", "instinct-")


@attrs.frozen
class Capacity:
    """Device memory in bytes as the framework sees it (`total_memory` of torch), `low` to `high` where sources differ.

    `basis` says what the numbers rest on and `evidence` who reports them, or which assumption replaces a report.
    """

    low: int
    high: int = attrs.field()
    basis: Basis
    evidence: str

    @high.validator
    def _ordered(self, _attribute: object, value: int) -> None:
        if not 0 < self.low <= value:
            raise ValueError(f"'capacity' must have 0 < low <= high: {self.low}..{value}")


@attrs.frozen
class Gpu:
    """One device as a framework counts devices; None and missing rates mean that no source gives the number.

    `bandwidth` is that of the device memory in bytes/s; `rates` pairs a short dtype name with dense operations/s;
    `link` joins the GPUs of a node, `host_link` leads to the host; `node_gpus` counts the GPUs of usual nodes.
    """

    name: str
    capacity: Capacity
    aliases: tuple[str, ...] = ()
    product: str = ""
    vendor: str = ""
    memory: str = ""
    bandwidth: Band | None = None
    rates: tuple[tuple[str, Band], ...] = ()
    link: Link | None = None
    host_link: Link | None = None
    link_note: str = ""
    node_gpus: Band | None = None
    source: str = ""
    confidence: str = ""

    def flops(self, dtype: str) -> Band:
        """Dense operations per second for a short dtype name (``bf16``); `UnsupportedError` where no source has it.

        fp16 falls back to bf16: tensor cores that know both run them at one rate (NVIDIA A100 architecture
        whitepaper, "BF16 ... at the same rate as FP16").
        """
        rates = dict(self.rates)
        rate = rates.get(dtype) or (rates.get("bf16") if dtype == "fp16" else None)
        if rate is None:
            known = ", ".join(rates) or "none"
            raise UnsupportedError(f"no known {dtype!r} rate of GPU {self.name!r}; rates known: {known}")
        return rate


def gpu(name: str) -> Gpu:
    """The GPU called `name`, in any case: ``a100-80``, an alias, the product or what torch calls the device.

    Raises:
        UsageError: no GPU is called so; the text names the nearest.
    """
    key = _key(name)
    return gpus.get(_aliases().get(key, key))


def all_gpus() -> list[Gpu]:
    """Every GPU of the catalogue and of plug-ins, by name."""
    return [gpus.get(name) for name in gpus.names()]


def _key(name: str) -> str:
    key = "-".join(name.lower().replace("_", " ").split())
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


@cache
def _catalogue() -> dict[str, Gpu]:
    return {row["name"]: _read(row) for row in read_table("gpus.csv")}


@cache
def _aliases() -> dict[str, str]:
    return {alias: card.name for card in _catalogue().values() for alias in (*card.aliases, _key(card.product))}


#: Third parties add a `Gpu` through the entry-point group; the name is in lower case.
gpus: Registry[Gpu] = Registry("GPU", "vramsim.gpus", builtin=_catalogue)


def _read(row: Row) -> Gpu:
    rates = ((dtype, read_band(row, dtype, unit, TERA)) for dtype, unit in _RATES.items())
    return Gpu(
        name=row["name"],
        capacity=_capacity(row),
        aliases=tuple(row["aliases"].split()),
        product=row["product"],
        vendor=row["vendor"],
        memory=row["memory"],
        bandwidth=read_band(row, "bandwidth", "GBps", GB),
        rates=tuple((dtype, band) for dtype, band in rates if band),
        link=_link(row["link"]),
        host_link=_link(row["host_link"]),
        link_note=row["link_note"],
        node_gpus=read_band(row, "node_gpus"),
        source=row["source"],
        confidence=row["confidence"],
    )


def _link(name: str) -> Link | None:
    return link(name) if name else None


def _capacity(row: Row) -> Capacity:
    """What frameworks report; else a band that the reports of other cards make likely, named as an assumption."""
    reported = row["capacity_evidence"]
    if band := read_band(row, "capacity", "bytes"):
        return Capacity(band.low, band.high, "framework", reported)
    if total := row["nvidia_smi_MiB"]:
        high = int(total) * MIB
        low = high * SEEN_OF_NVIDIA_SMI // 1000
        rule = "assumed: inferred from nvidia-smi total; the framework sees less, at least 96.8 % as on other cards"
        return Capacity(low, high, "nvidia-smi", _evidence(rule, reported))
    nominal = int(row["spec_GB"])
    low = nominal * GB * SEEN_OF_VENDOR // 1000
    rule = f"assumed: from the vendor's {nominal} GB, taken as 97 % of decimal GB at worst and as GiB at best"
    return Capacity(low, nominal * GIB, "vendor", _evidence(rule, reported))


def _evidence(rule: str, reported: str) -> str:
    return f"{rule} ({reported})" if reported else rule
