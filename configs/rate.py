"""A learning rate from one run to another: how the best one moves with tokens and batch."""

import math
from typing import Any

from geon.errors import UsageError

TOKENS_POWER = -0.45
"""d log lr* / d log tokens, at a fixed batch. Measured: docs/evidence.md, studies/rate_rule.py."""
BATCH_POWER = 0.63
"""d log lr* / d log (tokens a step), at fixed tokens. Measured as above."""


def carried_rate(lr: float, found_at: tuple[float, float], used_at: tuple[float, float]) -> float:
    """Rate for a run of another length and batch: lr (T'/T)^-0.45 (B'/B)^0.63.

    For rates that are norms of steps (optim=hybrid, muon and their kin), which do not move with the
    width. Powers are fitted to runs of 0.2 to 4 million tokens in batches of 512 to 4,096; how far
    they were held against others is in docs/evidence.md. AdamW's rate moves otherwise.

    Args:
        lr: best peak rate of the run at which it was searched.
        found_at: that run's tokens T, and tokens a step B.
        used_at: T' and B' of the run that is to use it.

    Raises:
        UsageError: a number that is not positive and finite.
    """
    for number in (lr, *found_at, *used_at):
        if not 0 < number < math.inf:
            raise UsageError(
                f"carried_rate({lr}, {found_at}, {used_at}): {number} must be finite and above 0"
            )
    tokens, batch = (used / found for used, found in zip(used_at, found_at, strict=True))
    return lr * tokens**TOKENS_POWER * batch**BATCH_POWER


def carry_rate(composed: Any) -> None:
    """Replace optim.lr of a composed config by that of the run's own tokens and batch.

    Rates that follow optim.lr follow the new one. Does nothing where optim.lr_at is zeros.

    Raises:
        UsageError: one of the two numbers of optim.lr_at without the other.
    """
    found_at = composed.optim.lr_at.tokens, composed.optim.lr_at.batch_tokens
    if not any(found_at):
        return
    if not all(number > 0 for number in found_at):
        raise UsageError(
            f"optim.lr_at.tokens={found_at[0]} with optim.lr_at.batch_tokens={found_at[1]}: the "
            "run that optim.lr was searched at has both, above 0"
        )
    batch = composed.data.batch_tokens
    used_at = composed.schedule.tokens or composed.schedule.steps * batch, batch
    lr = composed.optim.lr
    if lr > 0 and all(number > 0 for number in used_at):  # else refused by its own name, later
        composed.optim.lr = carried_rate(lr, found_at, used_at)
