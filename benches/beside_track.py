"""Our trainer beside the one of modded-nanogpt's track 3, on one CUDA GPU: the loss of every step.

python -m geon.benches.beside_track --track modded-nanogpt --data fineweb10B --steps 50

--track is a checkout of KellerJordan/modded-nanogpt: its train_gpt_simple.py is run as it is, and
watched by benches/track_run.py. --data is a folder of shards. Both trainers read the same tokens
in the same order, and start from the track's initial weights. Exit status 1 where losses differ by
more than --within at any step.
"""

import argparse
import gc
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geon.benches import results
from geon.configs.schema import Mode
from geon.engine.main import prepare
from geon.engine.metrics import hardware
from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.leave import guard
from geon.launch.local import ROOT, torchrun_command
from geon.scripts.flags import number, whole

SCRIPT = "records/track_3_optimization/train_gpt_simple.py"
KNOWN = "d39470e5b0535baf9c6caf7dbcd15efa79d8eacc9badf6e7c45b536e8537deec"
"""SHA-256 of that file at f411b3d (2026-08-01), which this was written for."""
BATCH = 8 * 64 * 1024
"""Tokens of its batch."""
VALIDATION = 20 * 524288
"""Tokens that it validates on before the first step."""
EXPERIMENT = "speedrun/track3_muon"
NAMES = (
    (r"^norm1\.", "norm_embed."),
    (r"^norm2\.", "norm."),
    (r"^proj\.", "head."),
    (r"\.attn\.([qkv])\.", r".proj_in.\1."),
    (r"\.attn\.proj\.", ".proj_out."),
    (r"\.mlp\.fc\.", ".up."),
    (r"\.mlp\.proj\.", ".down."),
)
"""Patterns in names of the track's GPT, and what stands there in gpt_track3."""


def shards(folder: Path, split: str) -> list[tuple[Path, int]]:
    """Shards of a split that the track's trainer can read, with their numbers of tokens.

    Raises:
        UsageError: there are none, or one is no uint16 shard.
    """
    found = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        header = np.fromfile(path, dtype="<i4", count=3)
        if list(header[:2]) != [20240520, 1]:
            raise UsageError(
                f"'{path}' (--data) is no uint16 shard with a header: version 1 is read"
            )
        found.append((path.absolute(), int(header[2])))
    if not found:
        raise UsageError(f"--data '{folder}' holds no *_{split}_*.bin")
    return found


def lay_out(data: Path, work: Path, steps: int) -> tuple[Path, list[str]]:
    """Links to the shards by the names that the track's trainer looks for.

    It reads a batch and one token, and drops the rest of a shard that has fewer; ours reads on. So
    all steps must lie in the first shard. Its validation shard may be any that is long enough: no
    validation is compared.

    Returns: the folder of the links, and lines for people.

    Raises:
        UsageError: shards are too short, or cannot be read.
    """
    train, val = shards(data, "train"), shards(data, "val")
    needed = (steps + 1) * BATCH + 2
    if train[0][1] < needed:
        raise UsageError(
            f"'{train[0][0]}' has {train[0][1]:,} tokens: --steps {steps} needs {needed:,} in the "
            "first shard, as both trainers go on to the next in another way"
        )
    enough = [path for path, count in [*val, *train] if count > VALIDATION + 1]
    if not enough:
        raise UsageError(f"--data '{data}' has no shard of more than {VALIDATION + 1:,} tokens")
    folder = work / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    for i, (path, _) in enumerate(train, 1):
        (folder / f"fineweb_train_{i:06d}.bin").symlink_to(path)
    (folder / "fineweb_val_000000.bin").symlink_to(enough[0])
    said = []
    if enough[0] != val[0][0]:
        said.append(f"'{val[0][0]}' is too short for the track's validation: it reads {enough[0]}")
    return folder, said


def theirs(
    script: Path, work: Path, steps: int, seed: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses in nats a token, and initial weights by the track's names.

    Raises:
        UsageError: the script ended before it had taken the steps.
    """
    arguments = [str(script), f"--steps={steps}", f"--seed={seed}", f"--out={work}"]
    command = torchrun_command(1, arguments, ROOT / "benches" / "track_run.py")
    log = work / "track.log"
    with log.open("wb") as file:
        status = subprocess.run(
            command, cwd=work, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    sums = json.loads(text.read_text()) if (text := work / "losses.json").is_file() else []
    if status or len(sums) < steps:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise UsageError(
            f"'{script}' took {len(sums)} of {steps} steps (exit status {status}); its last lines:"
            f"\n{tail}"
        )
    weights: dict[str, Tensor] = torch.load(work / "weights.pt", weights_only=True)
    return [one / BATCH for one in sums], weights


def our_name(name: str) -> str:
    """Name in gpt_track3 of a parameter of the track's GPT."""
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


@torch.no_grad()
def load_track_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set all parameters of a gpt_track3 from the track's by their names.

    Raises:
        UsageError: a parameter is missing, one is left over, or a shape differs.
    """
    params = dict(model.named_parameters())
    found = {our_name(name): value for name, value in weights.items()}
    shapes = [{n: tuple(t.shape) for n, t in one.items()} for one in (params, found)]
    if shapes[0] != shapes[1]:
        odd = sorted(dict(shapes[0].items() ^ shapes[1].items()))
        raise UsageError(f"the track's weights are not those of gpt_track3: {', '.join(odd[:4])}")
    for name, param in params.items():
        param.copy_(found[name])


def ours(
    folder: Path, weights: Mapping[str, Tensor], steps: int, overrides: Sequence[str]
) -> list[float]:
    """Losses of our trainer in nats a token, from the same weights on the same tokens.

    Raises:
        UsageError: as training does.
    """
    told = [
        f"experiment={EXPERIMENT}",
        "parallel=single",
        "data.dir=''",
        f'data.train="{folder}/fineweb_train_*.bin"',
        f'data.val="{folder}/fineweb_val_*.bin"',
        f'output="{folder.parent}"',
        "checkpoint=none",
        *overrides,
    ]
    config = compose(told)
    config.mode = Mode.train
    if config.data.batch_tokens != BATCH or config.data.shuffle:
        raise UsageError(
            f"the track reads {BATCH:,} tokens a step in their order: leave data alone"
        )
    trainer, _ = prepare(config, Env(), [])
    load_track_weights(trainer.run.model, weights)
    losses: list[Tensor] = []
    with closing(trainer.loader):
        while len(losses) < steps:
            trainer.train_step()
            if trainer.loss is None:
                raise UsageError(f"our step {trainer.step} met a number that is not finite")
            losses.append(trainer.loss)
    return [float(loss) for loss in losses]


def compare(theirs: Sequence[float], ours: Sequence[float], within: float) -> dict[str, Any]:
    """Differences ours - theirs by step, and whether all are small."""
    apart = [b - a for a, b in zip(theirs, ours, strict=True)]
    worst = max(range(len(apart)), key=lambda i: abs(apart[i]))
    return {
        "steps": len(apart),
        "within": within,
        "holds": all(abs(one) <= within for one in apart),
        "worst": abs(apart[worst]),
        "worst_step": worst + 1,
        "theirs": list(theirs),
        "ours": list(ours),
    }


def page(found: Mapping[str, Any]) -> str:
    """The comparison in Markdown, a row for every fifth step."""
    rows = ["| step | theirs | ours | ours - theirs |", "|---:|---:|---:|---:|"]
    for i, (a, b) in enumerate(zip(found["theirs"], found["ours"], strict=True), 1):
        if i == 1 or i % 5 == 0 or i == found["worst_step"]:
            rows.append(f"| {i} | {a:.5f} | {b:.5f} | {b - a:+.5f} |")
    word = "agree" if found["holds"] else "do not agree"
    told = f"Losses {word} within {found['within']:g} at every one of {found['steps']} steps"
    rows += ["", f"{told}: {found['worst']:.5f} at most, at step {found['worst_step']}"]
    return "\n".join(rows)


def run(arguments: Sequence[str] | None) -> int:
    """Run both, theirs first and in a process of its own, so that its memory is free again."""
    parser = argparse.ArgumentParser(
        prog="python -m geon.benches.beside_track",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides of our run")
    parser.add_argument("--track", type=Path, required=True, help="checkout of modded-nanogpt")
    parser.add_argument("--data", type=Path, required=True, help="folder of shards")
    parser.add_argument("--steps", type=whole(1, 3249), default=50, help="(50)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of their initial weights (0)")
    parser.add_argument("--within", type=number(), default=0.01, help="nats/token (0.01)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    told = parser.parse_intermixed_args(arguments)
    script = (told.track / SCRIPT).absolute()
    if not script.is_file():
        raise UsageError(f"--track '{told.track}' holds no {SCRIPT}")
    if not torch.cuda.is_available():
        raise UsageError("there is no CUDA device: the track's trainer runs on nothing else")
    digest = hashlib.sha256(script.read_bytes()).hexdigest()
    if digest != KNOWN:
        print(f"'{script}' is another version than the one that this was written for", flush=True)
    with TemporaryDirectory() as name:
        work = Path(name)
        folder, said = lay_out(told.data, work, told.steps)
        print(*said, f"running {SCRIPT}: {told.steps} steps", sep="\n", flush=True)
        losses, weights = theirs(script, work, told.steps, told.seed)
        gc.collect()
        print(f"running ours: experiment={EXPERIMENT}", flush=True)
        found = compare(losses, ours(folder, weights, told.steps, told.overrides), told.within)
    print(page(found))
    if told.json:
        facts = {"script_sha256": digest, "hardware": hardware("cuda"), "torch": torch.__version__}
        results.write(told.json, facts | found)
    return 0 if found["holds"] else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
