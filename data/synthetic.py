"""A seeded toy language whose entropy is known: for tests and benchmarks."""

import hashlib

import numpy as np

from geon.data.corpus import Corpus, Split
from geon.errors import UsageError

_BRANCH = 4


def synthetic_corpus(vocab_size: int, tokens: int, val_percent: float, seed: int = 0) -> Corpus:
    """First-order Markov text: after each token, one of four, with odds 8:4:2:2.

    The entropy rate is 1.213 nats a token, so a loss has a floor to be compared with.

    Raises:
        UsageError: a vocabulary that uint16 or the odds cannot hold, or too few tokens.
    """
    if not _BRANCH <= vocab_size <= 2**16:
        raise UsageError(
            f"data.vocab_size {vocab_size}: data=synthetic takes {_BRANCH} to {2**16} ids"
        )
    if tokens < 4:
        raise UsageError(f"data.tokens {tokens} is too few for data=synthetic")
    rng = np.random.Generator(np.random.PCG64(abs(seed)))
    followers = [rng.choice(vocab_size, size=_BRANCH, replace=False) for _ in range(vocab_size)]
    following = np.stack(followers)
    choice = rng.choice(_BRANCH, size=tokens, p=np.array([8, 4, 2, 2]) / 16)
    ids = np.empty(tokens, dtype=np.uint16)
    token = 0
    for i in range(tokens):
        token = following[token, choice[i]]
        ids[i] = token
    cut = tokens - max(2, int(tokens * val_percent / 100))
    return Corpus(
        train=Split("synthetic training tokens", [ids[:cut]]),
        val=Split("synthetic validation tokens", [ids[cut:]]),
        vocab_size=vocab_size,
        codec=None,
        val_text=b"",
        facts={
            "name": f"synthetic, seed {seed}",
            "train_tokens": cut,
            "val_tokens": tokens - cut,
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        },
    )
