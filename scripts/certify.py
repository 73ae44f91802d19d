"""Bounds of what a trained model does, and attempts to break them.

python -m geon.scripts.certify runs/first_run --search

Prints the certificate of a run folder's or checkpoint's weights. With --search, random pairs of
inputs and ascents on the Jacobian are held against it, each against the certificate of what
enters its own RMSNorms; exit status 1 if one lies above its bound.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from geon.engine import checkpoint
from geon.engine.callbacks import write_json
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.models import LanguageModel
from geon.optim.modular.certificate import Certificate, certificate, measure, observe
from geon.optim.modular.search import Found, Search
from geon.scripts.flags import whole


def load(path: Path) -> LanguageModel:
    """Model of a run folder or checkpoint, on the CPU.

    Raises:
        UsageError: no committed checkpoint there.
    """
    found, facts, _ = checkpoint.newest_sound(path, fall_back=False)
    if found is None:
        raise UsageError(f"'{path}' holds no committed checkpoint (give a run folder)")
    model = checkpoint.model_of(found, facts)
    model.to_empty(device="cpu")
    checkpoint.load_weights(found, model)
    return model


def run(arguments: Sequence[str] | None) -> int:
    """Certify and search; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("--search", action="store_true", help="try to break the certificate")
    parser.add_argument("--pairs", type=whole(), default=10_000, help="random pairs of inputs")
    parser.add_argument("--ascents", type=whole(), default=100, help="random starts of an ascent")
    parser.add_argument("--steps", type=whole(1, 10**4), default=20, help="steps of an ascent")
    parser.add_argument("--tokens", type=whole(1, 2**16), default=16, help="length of an input")
    parser.add_argument("--seed", type=whole(0, 2**62), default=0)
    parser.add_argument("--json", type=Path, help="file for certificate and findings")
    told = parser.parse_args(arguments)
    model = load(told.run)
    network = model.modular()
    params = {name: param.detach() for name, param in model.named_parameters()}
    generator = torch.Generator().manual_seed(told.seed)
    started = time.perf_counter()
    sizes = measure(network, params.__getitem__)
    seconds = time.perf_counter() - started
    time_ = min(told.tokens, model.shape.context)
    shape = (max(1, 4096 // model.shape.context), model.shape.context)
    tokens = torch.randint(0, model.shape.vocab_size, shape, generator=generator)
    smallest = observe(network, params.__getitem__, tokens)
    found = certificate(network, sizes, smallest, tokens.numel())
    print(found.table())
    print(f"weights measured in {seconds:.1f} s; tokens of observations were drawn at random")
    searches: dict[str, Found] = {}
    if told.search:
        search = Search(network, params, sizes, time_, generator)
        searches = {
            "pairs": search.pairs(told.pairs),
            "ascents": search.ascend(told.ascents, told.steps),
        }
        for name, one in searches.items():
            print(_line(name, one))
    if told.json is not None:
        write_json(told.json, _facts(found, seconds, searches))
    return 1 if any(one.violated for one in searches.values()) else 0


def _line(name: str, found: Found) -> str:
    verdict = "A BOUND IS VIOLATED" if found.violated else "no bound is violated"
    parts = [f"of the network {found.sensitivity:.3g}"]
    if found.size:
        parts += [f"of a node {found.node:.6g}", f"of a size {found.size:.6g}"]
    return f"{name}: {found.tried:,} tried, {verdict}; largest share {', '.join(parts)}"


def _facts(found: Certificate, seconds: float, searches: dict[str, Found]) -> dict[str, Any]:
    tried = {name: {**vars(one), "violated": one.violated} for name, one in searches.items()}
    return {"certificate": found.to_dict(), "seconds": round(seconds, 2), "searches": tried}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
