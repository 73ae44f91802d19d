"""Sample text from a checkpoint: python -m geon.scripts.generate runs/first_run --prompt 'def '."""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

from geon.data import Codec, load_codec
from geon.engine import checkpoint
from geon.engine.devices import pick_device
from geon.engine.sample import sample
from geon.errors import UsageError
from geon.models import IMAGE_MODELS, LanguageModel


def load(path: Path, device: str) -> tuple[LanguageModel, Codec]:
    """Model and codec of a run folder or checkpoint.

    Raises:
        UsageError: no committed checkpoint there, or one whose text has no codec.
    """
    found, facts, _ = checkpoint.newest_sound(path, fall_back=False)
    if found is None:
        raise UsageError(f"'{path}' holds no committed checkpoint (give a run folder)")
    if (arch := facts["model"]["arch"]) in IMAGE_MODELS:
        raise UsageError(f"'{found}' is a model of images ({arch}): it has no text to generate")
    if facts["codec"] is None:
        raise UsageError(f"'{found}' was trained on token ids whose text is not known (data=bins)")
    model = checkpoint.model_of(found, facts)
    model.to_empty(device=device)
    checkpoint.load_weights(found, model)
    try:
        codec = load_codec(facts["codec"])
    except UsageError:
        raise
    except Exception as error:  # whatever the tokenizers package makes of another text
        raise UsageError(f"'{found}' holds no tokenizer that can be read: {error}") from None
    return model.eval(), codec


def _check(args: argparse.Namespace) -> None:
    """Refuse flags out of range, naming the flag."""
    if not args.prompt:
        raise UsageError("--prompt must not be empty")
    if args.temperature != 0 and not 0.001 <= args.temperature <= 1000:
        raise UsageError(
            f"--temperature must be 0, or between 0.001 and 1000, got {args.temperature}"
        )
    limits = (("tokens", 10**7), ("top_k", 2**31), ("seed", 2**63 - 1))
    for name, most in limits:
        if not 0 <= getattr(args, name) <= most:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be between 0 and {most}, got {getattr(args, name)}")
    pick_device(args.device, 0)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=400, help="tokens to draw")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        _check(args)
        model, codec = load(args.run, args.device)
    except UsageError as error:
        print(f"geon: error: {error}", file=sys.stderr)
        return 2
    prompt = torch.from_numpy(codec.encode(args.prompt).astype(np.int64)).to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    tokens = sample(model, prompt, args.tokens, args.temperature, generator, args.top_k)
    try:
        print(codec.decode(tokens.tolist()).decode("utf-8", errors="replace"), flush=True)
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
