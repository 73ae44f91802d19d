"""How fast a machine is: what makes seconds of costs and bytes. No torch in here."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from geon.optim.costs import PASSES, Cost

Rates = tuple[tuple[int, float], ...]
"""(side, FLOP/s) of batched products, sides ascending: read between them as straight lines in
logarithms, and beyond the first and the last as those."""
FORMAT = 1
"""Version of the files that `doctor --measure` writes and `shard.machine=FILE.json` reads."""
WORD = 4


@dataclass(frozen=True)
class Bytes:
    """What travels, by the network that it crosses.

    Attributes:
        near: bytes between ranks of one node, or of a network of one level.
        far: bytes between ranks of two nodes.
    """

    near: int = 0
    far: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.near + other.near, self.far + other.far)

    @property
    def total(self) -> int:
        """Bytes over both networks together."""
        return self.near + self.far


@dataclass(frozen=True)
class Machine:
    """Speeds of one rank.

    Attributes:
        fp32, bf16, bf16x3: speeds of products by their short side; the passes of bf16x3 are not
            counted, but what it takes to split operands is in its speed.
        bandwidth: bytes/s that a rank sends.
        latency: seconds of an empty collective.
        memory: bytes/s that element-wise work reads and writes.
        operator: seconds in which the host issues one operator.
        node: consecutive ranks that share a node; 0 for a network of one level.
        far_bandwidth: bytes/s that a rank sends to other nodes; not read where node is 0.
        device: kind of device that it has, which decides what is in bf16.
    """

    fp32: Rates
    bf16: Rates
    bf16x3: Rates
    bandwidth: float
    latency: float
    memory: float = math.inf
    operator: float = 0.0
    node: int = 0
    far_bandwidth: float = 0.0
    device: str = "cuda"

    def crossing(self, sender: int, receiver: int, size: int) -> Bytes:
        """Bytes of one message, by the network that it crosses."""
        if self.node and sender // self.node != receiver // self.node:
            return Bytes(far=size)
        return Bytes(near=size)

    def travel(self, sent: Bytes) -> float:
        """Seconds for what one rank sends, or receives, without the latency of the collective."""
        far = sent.far / self.far_bandwidth if sent.far else 0.0
        return sent.near / self.bandwidth + far

    def compute(self, cost: Cost, side: int) -> float:
        """Seconds of the device for a cost, of products whose short side is `side`."""
        flops = ((getattr(cost, name), getattr(self, name)) for name in PASSES)
        products = sum(count / speed(rates, side) for count, rates in flops if count)
        return products + cost.words * WORD / self.memory

    def work(self, device_seconds: float, operators: int) -> float:
        """Seconds of what one rank computes: a GPU works while the host issues, a CPU does both."""
        host = operators * self.operator
        return device_seconds + host if self.device == "cpu" else max(device_seconds, host)

    def to_dict(self) -> dict[str, Any]:
        """The speeds in plain containers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Machine":
        """The machine that `to_dict` told of.

        Raises:
            ValueError: says what is missing or odd.
        """
        wanted = {f.name for f in fields(cls)}
        if set(found) != wanted:
            odd = ", ".join(sorted(set(found) ^ wanted))
            raise ValueError(f"its speeds lack, or have beside the known ones: {odd}")
        for name in PASSES:
            _check_rates(name, found[name])
        may_be_0 = ("operator", "far_bandwidth")
        for name in ("bandwidth", "latency", "memory", *may_be_0):
            value = found[name]
            if not _number(value) or value < 0 or (not value and name not in may_be_0):
                raise ValueError(f"{name} {found[name]!r} is no speed or time")
        if type(found["node"]) is not int or found["node"] < 0:
            raise ValueError(f"node {found['node']!r} is no number of ranks")
        if found["node"] and not found["far_bandwidth"]:
            raise ValueError("far_bandwidth is 0 beside a node")
        if found["device"] not in ("cpu", "cuda"):
            raise ValueError(f"device {found['device']!r} is not cpu or cuda")
        rates = {name: tuple((int(n), float(r)) for n, r in found[name]) for name in PASSES}
        return cls(**{**found, **rates})


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _check_rates(name: str, rates: Any) -> None:
    if not isinstance(rates, list | tuple) or not rates:
        raise ValueError(f"{name} is no list of [side, FLOP/s]")
    for row in rates:
        if not isinstance(row, list | tuple) or len(row) != 2 or not all(map(_number, row)):
            raise ValueError(f"{name} has a row {row!r}, not [side, FLOP/s]")
        if min(row) <= 0:
            raise ValueError(f"{name} has a row {row!r} that is not positive")
    for (side, rate), (next_side, next_rate) in zip(rates, rates[1:], strict=False):
        if next_side <= side or next_rate < rate:
            raise ValueError(f"{name} does not ascend at side {next_side}")


def constant(rate: float) -> Rates:
    """FLOP/s that are the same at every size."""
    return ((1, rate),)


def speed(rates: Rates, side: int) -> float:
    """FLOP/s at a size."""
    at = bisect_right(rates, side, key=lambda row: row[0])
    if at in (0, len(rates)):
        return rates[max(0, at - 1)][1]
    (low, slow), (high, fast) = rates[at - 1 : at + 1]
    share = math.log(side / low) / math.log(high / low)
    return slow * (fast / slow) ** share


def read_machine(content: Any) -> Machine:
    """The machine of a file that `python -m geon.scripts.doctor --measure` wrote.

    Raises:
        ValueError: says what is odd about it.
    """
    if not isinstance(content, dict) or not isinstance(content.get("machine"), dict):
        raise ValueError("it holds no machine")
    if content.get("format") != FORMAT:
        raise ValueError(f"its format is {content.get('format')!r}, not {FORMAT}")
    return Machine.from_dict(content["machine"])


# One H100 80GB HBM3, torch 2.11, one step of 12 layers of width 768 and of 4 of width 2,048
# (docs/results/operators_gpu.json, docs/distributed.md). Products: of Manifold Muon at 768, 1.54
# TFLOP of IEEE fp32 took 34 ms and 3.1 TFLOP of bf16 6 ms; at 2,048, 50 and 650 TFLOP/s. At 128 a
# bf16 product is bound by memory (3 s^2 numbers for 2 s^3 FLOPs); bf16x3 is a third of bf16. What
# is left of these steps moves 1.5 to 2.1 TB/s, where the data sheet says 3.35. Operators: 4.7, 19.6
# and 19.7 ms of the host for 123, 658 and 448. What is sent was never measured: NVLink, halved.
_GPU = Machine(
    fp32=((768, 4.5e13), (2048, 5e13)),
    bf16=((128, 1.2e14), (768, 5e14), (2048, 6.5e14)),
    bf16x3=((128, 4e13), (768, 1.7e14), (2048, 2.1e14)),
    bandwidth=1e11,
    latency=5e-5,
    memory=2e12,
    operator=4e-5,
)

# cpu: half a core of a server CPU over gloo, as on benches/sharding.py's four ranks on two
# cores. Nodes of eight GPUs are joined by one 400 Gb/s InfiniBand port a GPU, or by 100 Gb/s
# Ethernet a node, from data sheets, halved. `doctor --measure FILE.json` measures yours, and
# shard.tflops and its neighbours set some.
MACHINES = {
    "cpu": Machine(
        fp32=((32, 3.5e10), (128, 5e10)),
        bf16=((32, 6e10), (128, 1e11)),
        bf16x3=((32, 6e9), (256, 1.4e10)),
        bandwidth=4e8,
        latency=1e-3,
        memory=4e9,
        operator=5e-6,
        device="cpu",
    ),
    "cuda": _GPU,
    "cuda_infiniband": replace(_GPU, node=8, far_bandwidth=2.5e10, latency=1e-4),
    "cuda_ethernet": replace(_GPU, node=8, far_bandwidth=8e8, latency=2e-4),
}
