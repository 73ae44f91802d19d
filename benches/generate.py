"""Tokens a second of `generate`, beside transformers' own on the exported model.

python -m geon.benches.generate --json docs/results/generate.json

A model with drawn weights is exported; both take the likeliest token, so both make the same text,
which is checked. They run in turns; the median of the rounds counts.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Generator, Tensor

from geon.benches import results
from geon.engine.export import export
from geon.engine.generation import Draw, continued
from geon.engine.saved import Saved
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.models import LanguageModel, ModelShape, hf
from geon.models.fold import folded
from geon.scripts.flags import whole


def drawn(arch: str, shape: ModelShape) -> LanguageModel:
    """A model with its initial weights."""
    from geon.models import MODELS

    model = MODELS[arch](shape).eval()
    generator = Generator().manual_seed(0)
    with torch.no_grad():
        for info in model.infos:
            model.get_parameter(info.name).copy_(model.initial(info, generator))
    return model


def timed(make: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds, and what was made."""
    begin = time.perf_counter()
    ids = make()
    return time.perf_counter() - begin, ids


def measure(arch: str, rows: int, told: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both for a batch of prompts of one length."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    shape = ModelShape(
        told.vocab, told.prompt + told.tokens, told.layers, told.width // 64, told.width
    )
    model = drawn(arch, shape)
    prompt = torch.randint(told.vocab, (rows, told.prompt), generator=Generator().manual_seed(1))
    with TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        export(Saved(Path(folder), {"step": 0}, model, None), out)
        other = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    plain = folded(model)

    def ours() -> Tensor:
        steps = continued(plain, list(prompt), told.tokens, Draw(temperature=0.0))
        return torch.tensor(list(steps)).T

    def theirs() -> Tensor:
        ids = other.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=told.tokens,
            do_sample=False,
        )
        return ids[:, told.prompt :]

    for make in (ours, theirs):
        make()
    pairs = [(timed(ours), timed(theirs)) for _ in range(told.rounds)]
    if not all(torch.equal(a[1], b[1]) for a, b in pairs):
        raise UsageError(f"{arch}: the likeliest tokens of transformers are others than ours")
    made = rows * told.tokens
    speed = [made / statistics.median(pair[i][0] for pair in pairs) for i in (0, 1)]
    return {
        "arch": arch,
        "class": hf.map_of(model).kind(model.shape)[0],
        "parameters": model.parameter_count(),
        "rows": rows,
        "tokens_per_second": speed[0],
        "transformers": speed[1],
        "ratio": speed[0] / speed[1],
    }


def run(arguments: Sequence[str] | None) -> int:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.benches.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--layers", type=whole(high=1000), default=6)
    parser.add_argument("--width", type=whole(64, 1 << 16), default=256, help="heads have 64")
    parser.add_argument("--vocab", type=whole(2), default=4096)
    parser.add_argument("--prompt", type=whole(), default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=whole(), default=128, help="tokens after it")
    parser.add_argument("--rows", type=whole(), nargs="+", default=[1, 8], help="prompts at a time")
    parser.add_argument("--rounds", type=whole(), default=5)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    told = parser.parse_args(arguments)
    if told.width % 64:
        raise UsageError(f"--width {told.width} is not a multiple of 64, the width of a head")
    print(f"{'':6}{'rows':>5}{'tokens/s':>10}{'transformers':>14}{'ratio':>7}")
    found = []
    for arch in ("gpt", "gpt2"):
        for rows in told.rows:
            row = measure(arch, rows, told)
            found.append(row)
            print(
                f"{arch:6}{rows:5}{row['tokens_per_second']:10.1f}{row['transformers']:14.1f}"
                f"{row['ratio']:7.2f}",
                flush=True,
            )
    if told.json:
        settings = {k: v for k, v in vars(told).items() if k != "json"}
        machine = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
        versions = {name: version(name) for name in ("torch", "transformers")}
        results.write(
            told.json,
            {"format": 1, "settings": settings, **machine, "versions": versions, "rows": found},
        )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
