"""Kill ranks of a real run at random, and hold what it ends with against a run that nobody killed.

`python -m geon.benches.chaos --kills 5 --json`. Both runs are FSDP2 on two ranks under torchrun
--max-restarts. Every third kill waits for a checkpoint that is being written; the others come at
random steps. Whatever is given beside the options goes to train.py.
"""

import argparse
import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geon.benches import results
from geon.errors import UsageError
from geon.launch.leave import guard
from geon.launch.local import torchrun_command

RUN = """parallel=fsdp device=cpu data=synthetic data.tokens=200000 data.vocab_size=256
 data.val_tokens=4096 data.batch_tokens=4096 model.n_layer=2 model.n_head=4 model.d_model=128
 model.context=128 logger.every=1 checkpoint.every=2"""

_STEP = re.compile(r"step (\d+): loss (\S+),")
_LOST = re.compile(r"geon: error: rank \d+ on ")


@dataclass
class Trace:
    """What a run printed, with times.

    Attributes:
        steps: (seconds since the start, step, loss) of every step that was taken, repeats included.
        kills: seconds at which a rank was killed.
        told: seconds at which a survivor said so.
    """

    status: int = 0
    seconds: float = 0.0
    steps: list[tuple[float, int, str]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    saves: int = 0
    told: list[float] = field(default_factory=list)
    tail: list[str] = field(default_factory=list)


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks under a torchrun."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    found = []
    for child in map(int, children):
        try:
            if re.search(rb"\0RANK=\d", Path(f"/proc/{child}/environ").read_bytes()):
                found.append(child)
        except OSError:
            continue  # it has just ended
    return found


def run(arguments: Sequence[str], folder: Path, at: Sequence[int], draw: random.Random) -> Trace:
    """One run, with a kill at each of the steps in `at`."""
    told, begin = Trace(), time.monotonic()
    options = [f"--max-restarts={len(at) + 5}", "--monitor-interval=0.1"]
    head, tail = torchrun_command(2, arguments), len(arguments) + 1
    process = subprocess.Popen(
        [*head[:-tail], *options, *head[-tail:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    left = list(at)
    busy = threading.Lock()

    def kill(during_save: bool) -> None:
        with busy:
            if during_save:
                deadline = time.monotonic() + 20
                while not any(folder.glob("checkpoints/*.writing")):
                    if time.monotonic() > deadline or process.poll() is not None:
                        break
                    time.sleep(0.001)
                else:
                    told.saves += 1
                time.sleep(draw.uniform(0, 0.05))
            ranks = ranks_of(process.pid)
            if ranks:
                told.kills.append(time.monotonic() - begin)
                os.kill(draw.choice(ranks), signal.SIGKILL)

    try:
        for line in process.stdout:
            now = time.monotonic() - begin
            told.tail = [*told.tail[-30:], line.rstrip()]
            if _LOST.match(line):
                told.told.append(now)
            if not (found := _STEP.match(line)):
                continue
            told.steps.append((now, int(found[1]), found[2]))
            if left and int(found[1]) >= left[0] and not busy.locked():
                left.pop(0)
                during_save = len(at) - len(left) > 1 and (len(at) - len(left)) % 3 == 0
                threading.Thread(target=kill, args=(during_save,), daemon=True).start()
        told.status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    told.seconds = time.monotonic() - begin
    return told


def final_hash(folder: Path) -> str:
    """SHA-256 over all tensors of the newest checkpoint, weights and optimizer state."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    newest = max((p for p in (folder / "checkpoints").glob("step-*") if p.is_dir()), key=str)
    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(newest, file.name)
        tensors = _flat(torch.load(file.name, weights_only=True))
    total = hashlib.sha256()
    for name, tensor in sorted(tensors):
        total.update(name.encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def compare(calm: Trace, killed: Trace, every: int, equal: bool) -> dict[str, Any]:
    """The figures: what was lost, how long it took to see and to go on."""
    reference = {step: loss for _, step, loss in calm.steps}
    steps = max(reference)
    wrong = [step for _, step, loss in killed.steps if reference.get(step) != loss]
    detect, restart = [], []
    for i, moment in enumerate(killed.kills):
        until = killed.kills[i + 1] if i + 1 < len(killed.kills) else killed.seconds
        detect += [t - moment for t in killed.told if moment < t < until][:1]
        repeats = (
            now - moment
            for (_, before, _), (now, step, _) in zip(killed.steps, killed.steps[1:], strict=False)
            if step <= before and moment < now <= until
        )
        fresh = next(repeats, None)
        if fresh is None:  # it was killed right after a checkpoint: no step is repeated
            gaps = [t for t, _, _ in killed.steps if moment + 1 < t <= until]
            fresh = gaps[0] - moment if gaps else None
        restart += [fresh] if fresh is not None else []
    gaps = [(b[0] - a[0], a[1]) for a, b in zip(calm.steps, calm.steps[1:], strict=False)]
    usual = statistics.median([gap for gap, step in gaps if step % every] or [0.0])
    stalls = [gap - usual for gap, step in gaps if step % every == 0]
    return {
        "kills": len(killed.kills),
        "kills_during_saves": killed.saves,
        "survived": len(restart),
        "exit_status": killed.status,
        "final_hash_equal": equal,
        "steps": steps,
        "steps_executed": len(killed.steps),
        "step_goodput": steps / max(len(killed.steps), 1),
        "seconds": killed.seconds,
        "seconds_without_kills": calm.seconds,
        "time_ratio": calm.seconds / killed.seconds,
        "detect_seconds_max": max(detect, default=None),
        "restart_seconds_median": statistics.median(restart) if restart else None,
        "corrupt_loaded": len(wrong),
        "save_stall_seconds_max": max(stalls, default=None),
    }


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status: 1 when the ends differ."""
    parser = argparse.ArgumentParser(prog="python -m geon.benches.chaos", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, e.g. checkpoint.every=2")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="figures as JSON")
    told = parser.parse_intermixed_args(arguments)

    def act() -> int:
        if not Path("/proc/self/task").is_dir():
            raise UsageError("chaos finds the ranks in /proc, which this system lacks: use Linux")
        if told.kills < 1 or told.steps < 4 * told.kills:
            raise UsageError(f"--kills {told.kills} need --steps of 4 times as many at least")
        draw = random.Random(told.seed)
        at = sorted(draw.sample(range(1, told.steps - 1), told.kills))
        with tempfile.TemporaryDirectory() as place:
            common = [*RUN.split(), f"schedule.steps={told.steps}", f"output={place}"]
            traces = {}
            for name, kills in (("calm", []), ("killed", at)):
                options = [*common, *told.overrides, f"name={name}"]
                traces[name] = run(options, Path(place, name), kills, draw)
                if traces[name].status:
                    print("\n".join(traces[name].tail), file=sys.stderr)
                    return 1
            ends = [final_hash(Path(place, name)) for name in traces]
        every = next(
            int(t.split("=")[1]) for t in [*told.overrides, *RUN.split()] if "point.every=" in t
        )
        figures = compare(traces["calm"], traces["killed"], every, ends[0] == ends[1])
        text = json.dumps(figures, indent=2)
        if told.json not in (None, "-"):
            results.write(Path(told.json), figures)
        print(text if told.json else "\n".join(f"{k}: {v}" for k, v in figures.items()))
        bad = figures["survived"] < figures["kills"] or figures["corrupt_loaded"]
        return 0 if figures["final_hash_equal"] and not bad else 1

    return guard(act)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
