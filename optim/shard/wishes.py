"""What the user may choose about a plan."""

from dataclasses import dataclass

from geon.errors import UsageError, nearest
from geon.optim.shard.cost import MACHINES, Machine

TRANSPORTS = ("auto", "owner", "gram", "allgather")
OBJECTIVES = ("time", "bytes")


@dataclass(frozen=True)
class Wishes:
    """What the user may choose about a plan.

    Attributes:
        transport: auto; or owner, gram, allgather wherever a matrix must be made whole (owner
            where the chosen one does not apply).
        objective: what auto minimises: predicted time, or bytes.
        reproducible: owners only, each matrix computed alone: bit-identical to one process.
        max_buffer_mb: scratch of one bucket on a rank; a bucket may always hold one matrix a rank.
        machine: speeds, for predictions.
    """

    transport: str = "auto"
    objective: str = "time"
    reproducible: bool = False
    max_buffer_mb: float = 64.0
    machine: Machine = MACHINES["cpu"]

    def __post_init__(self) -> None:
        known = {"transport": TRANSPORTS, "objective": OBJECTIVES}
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
