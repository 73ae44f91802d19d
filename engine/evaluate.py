"""Validation loss in nats per token and per byte, on every rank's share of the text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from geon.data import Corpus
from geon.engine.parallel import Parallel
from geon.errors import UsageError
from geon.models import IGNORED

ASK_EVERY = 4
"""Batches of a rank between two questions whether to stop."""

_PIECE = 1 << 22
"""Tokens whose bytes are counted at a time."""


@dataclass(frozen=True)
class Evaluation:
    """Loss over a run of validation tokens.

    nats_per_byte is None when the ids' text is not known. parts: of a mixture, those of its sources
    by name; the losses are then means by their shares.
    """

    tokens: int
    nats_per_token: float
    nats_per_byte: float | None
    parts: Mapping[str, "Evaluation"] = field(default_factory=dict)
    accuracy: float | None = None
    """task=image: share of the images whose class is the likeliest one."""

    def to_dict(self) -> dict[str, float | int | None]:
        """The evaluation as a flat record of the log; a source's figures end in its name."""
        found: dict[str, float | int | None] = {
            "val_tokens": self.tokens,
            "val_nats_per_token": self.nats_per_token,
            "val_nats_per_byte": self.nats_per_byte,
        }
        if self.accuracy is not None:
            found["val_accuracy"] = self.accuracy
        for name, part in self.parts.items():
            found |= {f"{key}.{name}": value for key, value in part.to_dict().items()}
        return found


def together(parts: Mapping[str, Evaluation], shares: Mapping[str, float]) -> Evaluation:
    """Evaluation of a mixture: nats of its average token, and of its average byte."""
    nats = sum(shares[name] * part.nats_per_token for name, part in parts.items())
    size = 0.0
    for name, part in parts.items():
        if part.nats_per_byte is None:
            size = 0.0
            break
        size += shares[name] * part.nats_per_token / part.nats_per_byte
    tokens = sum(part.tokens for part in parts.values())
    return Evaluation(tokens, nats, nats / size if size else None, parts)


def val_windows(corpus: Corpus, context: int, val_tokens: int) -> int:
    """Windows that are evaluated: consecutive ones from the start, `val_tokens` at most.

    Raises:
        UsageError: not one whole window.
    """
    available = corpus.val.windows(context)
    windows = min(available, val_tokens // context) if val_tokens else available
    if windows < 1:
        raise UsageError(
            f"{corpus.val.name}: data.val_tokens {val_tokens} of {len(corpus.val)} tokens do not "
            f"fill one window of model.context {context}: keep more (data.val_percent, data.val, "
            "data.tokens), or lower model.context"
        )
    return windows


def val_bytes(corpus: Corpus, context: int, windows: int) -> int:
    """How many bytes those windows predict, all but the first token's; 0 where not known."""
    lengths = corpus.codec.token_bytes() if corpus.codec else None
    if lengths is None:
        return 0
    count = windows * context + 1
    pieces = (corpus.val.window(i, min(_PIECE, count - i)) for i in range(1, count, _PIECE))
    return sum(int(lengths[ids].sum()) for ids in pieces)


def val_text(corpus: Corpus, context: int, windows: int, most: int = 1 << 24) -> bytes:
    """The bytes that those windows predict, decoded from their first `most` tokens."""
    if corpus.codec is None or not val_bytes(corpus, context, windows):
        return b""
    count = min(windows * context, most)
    return corpus.codec.decode(corpus.val.window(1, count))


def check_val(corpus: Corpus, context: int, val_tokens: int) -> None:
    """Refuse validation tokens, of a source of a mixture too, that do not fill one window.

    Raises:
        UsageError: as `val_windows`.
    """
    for part in corpus.parts.values() or [corpus]:
        val_windows(part, context, val_tokens)


@torch.no_grad()
def evaluate(
    parallel: Parallel,
    corpus: Corpus,
    context: int,
    val_tokens: int,
    batch: int,
    stop: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """Evaluate windows of `context` tokens that do not overlap. Every rank must call this.

    Batches go to ranks in turn; a rank that has none left repeats the first with weight zero,
    because sharded ranks must run the same number of forward passes. All batches have one shape, so
    that a compiled model is compiled once: the last is filled up with a window that is not counted.

    stop: asked now and then, on every rank alike, whether to leave it; then there is no result.
    """
    if corpus.parts:
        every = corpus.parts.values()
        batch = min(batch, *(val_windows(part, context, val_tokens) for part in every))
        found: dict[str, Evaluation] = {}
        for name, part in corpus.parts.items():
            one = evaluate(parallel, part, context, val_tokens, batch, stop)
            if one is None:
                return None
            found[name] = one
        return together(found, corpus.shares)
    windows = val_windows(corpus, context, val_tokens)
    batch = min(batch, windows)
    batches = [range(i, min(i + batch, windows)) for i in range(0, windows, batch)]
    tensor = parallel.tensor  # ranks that compute the same batch together
    rank, world = parallel.env.rank // tensor, parallel.env.world // tensor
    total = torch.zeros((), dtype=torch.float64, device=parallel.device)
    for turn in range(-(-len(batches) // world)):
        if stop is not None and turn % ASK_EVERY == ASK_EVERY - 1 and stop():
            parallel.reshard()
            return None
        mine = turn * world + rank
        chosen = batches[mine] if mine < len(batches) else batches[0]
        filled = [*chosen, *[chosen[0]] * (batch - len(chosen))]
        rows = np.stack([corpus.val.window(w * context, context + 1) for w in filled])
        tokens = torch.from_numpy(rows.astype(np.int64)).to(parallel.device)
        targets = tokens[:, 1:].clone()
        targets[len(chosen) :] = IGNORED
        loss = parallel.loss(tokens[:, :-1].contiguous(), targets)
        if mine < len(batches):
            total += loss.double() * len(chosen) * context
    parallel.reshard()
    count = windows * context
    nats = parallel.sum(total).item() / tensor
    size = val_bytes(corpus, context, windows)
    return Evaluation(count, nats / count, nats / size if size else None)
