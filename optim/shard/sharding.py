"""The one description of an exchange: what the user may choose about it."""

from dataclasses import dataclass

from geon.errors import UsageError, nearest
from geon.optim.shard.machine import MACHINES, Machine

CHOICES = ("auto", "owner", "gram")
OBJECTIVES = ("time", "bytes")
WIRES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Sharding:
    """What the user may choose about an exchange.

    Attributes:
        transport: auto; or owner, gram wherever a matrix must be made whole (owner where the chosen
            one does not apply).
        objective: what auto minimises: predicted time, or bytes.
        reproducible: owners only, each matrix computed alone: bit-identical to one process.
        max_buffer_mb: scratch of one bucket on a rank; a bucket may always hold one matrix a rank.
        wire: words of updates and directions that travel, fp32 or bf16; weights and sums are
            always fp32.
        machine: speeds, for predictions.
        by_parameter: a bucket for each parameter, in the given order, for frameworks that step
            parameter by parameter.
    """

    transport: str = "auto"
    objective: str = "time"
    reproducible: bool = False
    max_buffer_mb: float = 64.0
    wire: str = "fp32"
    machine: Machine = MACHINES["cpu"]
    by_parameter: bool = False

    def __post_init__(self) -> None:
        known = {"transport": CHOICES, "objective": OBJECTIVES, "wire": tuple(WIRES)}
        for key, words in known.items():
            if (value := getattr(self, key)) not in words:
                raise UsageError(
                    f"shard.{key} '{value}' is not one of {', '.join(words)}."
                    f"{nearest(value, list(words))}"
                )
        if self.reproducible and self.transport not in ("auto", "owner"):
            raise UsageError(
                f"shard.reproducible=true takes owners only, but shard.transport is "
                f"'{self.transport}': set it to auto or owner"
            )
        if self.reproducible and self.wire != "fp32":
            raise UsageError(
                "shard.reproducible=true needs every bit: set shard.wire=fp32 or auto, not "
                f"{self.wire}"
            )

    @property
    def wire_bytes(self) -> int:
        """Bytes of an entry of an update or direction that travels."""
        return WIRES[self.wire]
