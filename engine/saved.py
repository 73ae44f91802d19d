"""The model of a checkpoint on one process, whatever ranks trained it: to use, not to train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geon.data import Codec, load_codec
from geon.engine import checkpoint
from geon.errors import UsageError
from geon.models import LanguageModel


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read.

    Attributes:
        path: the checkpoint.
        facts: its commit file.
        model: in evaluation mode.
        codec: None where the text of its ids is not known.
    """

    path: Path
    facts: dict[str, Any]
    model: LanguageModel
    codec: Codec | None

    @property
    def run(self) -> Path:
        """The run folder that the checkpoint lies in."""
        return self.path.resolve().parent.parent


def open_saved(place: Path, device: str = "cpu") -> Saved:
    """Read the newest checkpoint of a run folder, or the one that a path names.

    Raises:
        UsageError: none there, one that is not sound, or a tokenizer that cannot be read.
    """
    found, facts, _ = checkpoint.newest_sound(place, fall_back=False)
    if found is None:
        raise UsageError(f"'{place}' holds no committed checkpoint (give a run folder)")
    model = checkpoint.model_of(found, facts)
    model.to_empty(device=device)
    checkpoint.load_weights(found, model)
    codec = None
    try:
        if facts["codec"] is not None:
            codec = load_codec(facts["codec"])
    except UsageError:
        raise
    except Exception as error:  # whatever the tokenizers package makes of another text
        raise UsageError(f"'{found}' holds no tokenizer that can be read: {error}") from None
    return Saved(found, facts, model.eval(), codec)
