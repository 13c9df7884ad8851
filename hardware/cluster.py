"""Which GPUs a job runs on: ``a100-80``, ``8xh100-80``, or ``24GiB`` for a card that no table knows."""

from __future__ import annotations

import re

import attrs

from hardware.errors import UsageError
from hardware.gpus import Capacity, Gpu, gpu
from hardware.units import GIB, MIB, parse

#: Far above every cluster built, so that a slip of the keyboard is caught.
MOST_GPUS = 10_000_000
#: The bounds of a capacity that somebody means: below, the unit is wrong; above, no device exists.
LEAST_CAPACITY, MOST_CAPACITY = 64 * MIB, 1024 * 16 * GIB

#: GPUs of a node where no source says (DGX A100 and H100, HGX boards: eight).
USUAL_NODE_GPUS = 8

_COUNTED = re.compile(r"(?P<count>[+-]?[0-9.]+)\s*x\s*(?P<card>.*)", re.IGNORECASE)
_WHOLE = re.compile(r"[0-9]{1,20}")
_CAPACITY = re.compile(r"[0-9.]+\s*[kmgt]?i?b", re.IGNORECASE)


@attrs.frozen
class Cluster:
    """`count` GPUs of one kind."""

    gpu: Gpu
    count: int = attrs.field(default=1)

    @count.validator
    def _counted(self, _attribute: object, value: int) -> None:
        if not 1 <= value <= MOST_GPUS:
            raise UsageError(f"'gpus' must count 1 to {MOST_GPUS} devices, e.g. 8xh100-80: {value}")

    @property
    def node_gpus(self) -> int:
        """How many of them share the host memory of one node: as many as usual nodes of this GPU have at most."""
        usual = USUAL_NODE_GPUS if self.gpu.node_gpus is None else self.gpu.node_gpus.high
        return min(self.count, usual)

    def __str__(self) -> str:
        return self.gpu.name if self.count == 1 else f"{self.count}x{self.gpu.name}"


def parse_cluster(text: str) -> Cluster:
    """The cluster that ``NAME`` or ``COUNTxNAME`` means; a capacity (``24GiB``) may stand for the name.

    Raises:
        UsageError: the text has another form, the count is not a positive whole number, or no GPU is called so.
    """
    match = _COUNTED.fullmatch(text.strip())
    count, card = match.group("count", "card") if match else ("1", text.strip())
    if not card or not _WHOLE.fullmatch(count):
        raise UsageError(f"'gpus' must be NAME or COUNTxNAME with a whole COUNT, e.g. a100-80 or 8xh100-80: {text!r}")
    return Cluster(_card(card), int(count))


def _card(text: str) -> Gpu:
    return _anonymous(text) if _CAPACITY.fullmatch(text) else gpu(text)


def _anonymous(text: str) -> Gpu:
    nbytes = parse("gpus", text)
    if not LEAST_CAPACITY <= nbytes <= MOST_CAPACITY:
        raise UsageError(f"'gpus' must have a capacity of 64 MiB to 16 TiB, e.g. 24GiB or 80GB: {text!r}")
    return Gpu(name="".join(text.split()), capacity=Capacity(nbytes, nbytes, "given", "as given; no card is named"))
