"""What ids say as they come: text without half characters, up to a stop string."""

import codecs
from collections.abc import Sequence

from geon.data import Codec


class Spoken:
    """The text of a growing row of ids.

    Attributes:
        text: all that was given out.
        done: whether a stop string or the end of the document has come.
    """

    def __init__(self, codec: Codec, stops: Sequence[str] = (), past_end: bool = False) -> None:
        """stops: texts that end it, and are not given out. past_end: go on after a document."""
        self._codec, self._stops = codec, stops
        self._end = None if past_end else codec.eot
        self._exact = codec.token_bytes() is not None
        self._ids: list[int] = []
        self._given = 0
        self._reader = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.text, self.done = "", False

    def take(self, token: int) -> str:
        """Add an id; returns what can be given out: no beginning of a stop string."""
        if self.done:
            return ""
        if token == self._end:
            self.done = True
            return self._give(self._held)
        return self._heard(self._reader.decode(self._bytes(token)))

    def close(self) -> str:
        """What is left when no more ids come."""
        if self.done:
            return ""
        said = self._heard(self._reader.decode(b"", final=True))
        if not self.done:
            said += self._give(self._held)
        self.done = True
        return said

    def _bytes(self, token: int) -> bytes:
        """The bytes that an id adds."""
        if self._exact:
            return self._codec.decode([token])
        # The rest of the tokenizers join words by their neighbours: all of it is decoded again, and
        # what ends in half a character waits for the next id.
        self._ids.append(token)
        whole = self._codec.decode(self._ids).decode("utf-8", "replace")
        if whole.endswith("\ufffd"):
            return b""
        new, self._given = whole[self._given :], len(whole)
        return new.encode()

    def _heard(self, new: str) -> str:
        held = self._held + new
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.done = True
            return self._give(held[: min(found)])
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        said = self._give(held[: len(held) - keep])
        self._held = held[len(held) - keep :]
        return said

    def _give(self, said: str) -> str:
        self._held = ""
        self.text += said
        return said


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text begin a stop string."""
    return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
