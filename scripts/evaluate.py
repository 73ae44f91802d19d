"""Loss of a checkpoint: python -m geon.scripts.evaluate runs/first_run [--data FILE_OR_FOLDER].

Without --data, on the run's own validation text and with its settings: the trainer's number. With
it, on all text of a file or folder (as data=text reads it), on a shard of ids (.bin, .npy), or on
the validation split of a folder with a meta.json.
"""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from geon.configs.check import resolve
from geon.configs.schema import Config
from geon.engine.callbacks import write_json
from geon.engine.evaluate import Evaluation
from geon.engine.saved import Saved, open_saved
from geon.engine.scoring import anything, score, validation
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.scripts.flags import whole


def config_of(saved: Saved) -> Config:
    """The settings of the run at a checkpoint.

    Raises:
        UsageError: it holds none.
    """
    if not saved.facts.get("settings"):
        raise UsageError(f"'{saved.path}' holds no settings: it is of an earlier version")
    return resolve(OmegaConf.create(saved.facts["settings"]))


def told(name: str, one: Evaluation) -> str:
    """One line of text."""
    bits = "bits/byte not known"
    if one.nats_per_byte is not None:
        bits = f"{one.nats_per_byte / math.log(2):.5f} bits/byte"
    return f"{name}: {one.nats_per_token:.5f} nats/token, {bits}, {one.tokens:,} tokens"


def facts_of(one: Evaluation) -> Mapping[str, Any]:
    """What is written as JSON."""
    bits = None if one.nats_per_byte is None else one.nats_per_byte / math.log(2)
    return {**one.to_dict(), "val_bits_per_byte": bits}


def run(arguments: Sequence[str] | None) -> int:
    """Evaluate, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.scripts.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", type=Path, help="text, or ids; the run's own if left out")
    parser.add_argument(
        "--tokens",
        type=whole(0, 2**62),
        help="tokens at most, 0 for all (data.val_tokens of the run; with --data, all)",
    )
    parser.add_argument("--batch", type=whole(), help="windows at a time (eval.batch of the run)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    args = parser.parse_args(arguments)
    saved = open_saved(args.run, args.device)
    config = config_of(saved)
    if args.data is None:
        corpus, tokens = validation(config, saved), config.data.val_tokens
    else:
        corpus, tokens = anything(args.data, config, saved), 0
    tokens = tokens if args.tokens is None else args.tokens
    found = score(config, saved, corpus, tokens, args.batch or config.eval.batch, args.device)
    print(saved.path)
    print(told(str(corpus.facts["name"]), found))
    for name, part in found.parts.items():
        print(told(f"  {name}", part))
    if args.json:
        write_json(args.json, facts_of(found))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
