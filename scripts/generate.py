"""Text from a checkpoint: python -m geon.scripts.generate runs/first_run --prompt 'def '.

The text of one prompt is printed as it comes. Several (--prompt A --prompt B) are continued
together, and printed at the end.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch

from geon.data import Codec
from geon.engine.devices import pick_device
from geon.engine.generation import Draw, continued
from geon.engine.saved import open_saved
from geon.engine.spoken import Spoken
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.models import IMAGE_MODELS, LanguageModel
from geon.models.fold import folded


def load(path: Path, device: str) -> tuple[LanguageModel, Codec]:
    """Model and codec of a run folder or checkpoint.

    Raises:
        UsageError: no committed checkpoint there, or one whose text has no codec.
    """
    saved = open_saved(path, device)
    if (arch := saved.facts["model"]["arch"]) in IMAGE_MODELS:
        raise UsageError(
            f"'{saved.path}' is a model of images ({arch}): it has no text to generate"
        )
    if saved.codec is None:
        raise UsageError(
            f"'{saved.path}' was trained on token ids whose text is not known (data=bins)"
        )
    return saved.model, saved.codec


def _check(args: argparse.Namespace) -> None:
    """Refuse flags out of range, naming the flag."""
    for name in ("prompt", "stop"):
        if not all(getattr(args, name)):
            raise UsageError(f"--{name} must not be empty")
    if args.temperature != 0 and not 0.001 <= args.temperature <= 1000:
        raise UsageError(
            f"--temperature must be 0, or between 0.001 and 1000, got {args.temperature}"
        )
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p must be above 0, at most 1, got {args.top_p}")
    if args.temperature == 0 and (args.top_k or args.top_p < 1):
        name = "top-k" if args.top_k else "top-p"
        raise UsageError(f"--{name} has no effect with --temperature 0, which draws nothing")
    limits = (("tokens", 10**7), ("top_k", 2**31), ("seed", 2**63 - 1))
    for name, most in limits:
        if not 0 <= getattr(args, name) <= most:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag} must be between 0 and {most}, got {getattr(args, name)}")
    pick_device(args.device, 0)


def _speak(model: LanguageModel, codec: Codec, args: argparse.Namespace) -> None:
    """Print prompts with their continuations."""
    encoded = [codec.encode(text).astype(np.int64) for text in args.prompt]
    prompts = [torch.from_numpy(ids).to(args.device) for ids in encoded]
    rows = [Spoken(codec, args.stop, args.past_end) for _ in prompts]
    draw = Draw(args.temperature, args.top_k, args.top_p)
    generator = torch.Generator().manual_seed(args.seed)
    alone = len(rows) == 1
    if alone:
        print(args.prompt[0], end="", flush=True)
    for ids in continued(folded(model), prompts, args.tokens, draw, generator):
        said = [row.take(token) for row, token in zip(rows, ids, strict=True)]
        if alone:
            print(said[0], end="", flush=True)
        if all(row.done for row in rows):
            break
    last = [row.close() for row in rows]
    if alone:
        print(last[0], flush=True)
        return
    for i, (prompt, row) in enumerate(zip(args.prompt, rows, strict=True), 1):
        print(f"--- {i} ---\n{prompt}{row.text}", flush=True)


def run(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--prompt", action="append", help="'def '; several are a batch")
    parser.add_argument("--tokens", type=int, default=400, help="most tokens to draw")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest; 0: all")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="from the likeliest with odds of p together"
    )
    parser.add_argument(
        "--stop", action="append", default=[], help="text that ends it; may be given several times"
    )
    parser.add_argument(
        "--past-end", action="store_true", help="go on after the token that ends a document"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.prompt = ["def "] if args.prompt is None else args.prompt
    _check(args)
    model, codec = load(args.run, args.device)
    try:
        _speak(model, codec, args)
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
