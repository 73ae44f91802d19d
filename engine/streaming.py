"""Where a stream stands: gathered from the ranks into a checkpoint, and taken up from one."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from geon.data import Batches, StreamBatches
from geon.engine.parallel import Parallel
from geon.errors import UsageError


def facts(batches: Batches, step: int, parallel: Parallel) -> dict[str, Any] | None:
    """JSON for a commit file: places of all parts where `step` is read from; every rank must call.

    None where data are a function of the step, or nothing has been read.
    """
    if not isinstance(batches, StreamBatches):
        return None
    assert batches.recipe is not None
    places: dict[str, Any] = {}
    for found in parallel.gather(batches.places_at(step)):
        places |= {str(part): place for part, place in (found or {}).items()}
    if not places:
        return None
    return {"streams": batches.recipe.parts, "places": places}


def resumed(batches: Batches, checkpoint: Path, facts: Mapping[str, Any]) -> Batches:
    """Batches that go on where a checkpoint's stream stood, at any number of ranks.

    Raises:
        UsageError: a stream that was read in another number of parts, or places that are not all
            there.
    """
    if not isinstance(batches, StreamBatches):
        return batches
    assert batches.recipe is not None
    parts, saved = batches.recipe.parts, facts.get("stream")
    if saved is None:  # of another source, which checkpoint.allow_change let go: from the begin
        return replace(batches, places=None)
    if saved.get("streams") != parts:
        raise UsageError(
            f"data.streams {parts}, but the stream of '{checkpoint}' was read in "
            f"{saved.get('streams')} parts, whose places say nothing of others: set "
            f"data.streams={saved.get('streams')}"
        )
    try:
        places = {part: saved["places"][str(part)] for part in range(parts)}
    except (KeyError, TypeError):
        raise UsageError(f"'{checkpoint}' does not say where all of its stream stood") from None
    return replace(batches, places=places)
