"""A race of optimizers on this machine's Python sources, without a download: `make speedrun`.

python -m geon.studies.speedrun                      # tiny on a CPU, 124m on a GPU
python -m geon.studies.speedrun --size tiny seed=1

Makes the shards unless they are there, trains the arms of sweep=speedrun (or speedrun_124m) one
after the other, and prints for each the step, tokens and seconds at which it got to the final loss
of AdamW. Arms that have finished are skipped. Every run folder holds a card.md;
results/speedrun_offline.json (on a GPU speedrun_offline_124m.json) and a picture hold the race.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from geon.errors import UsageError
from geon.launch.compose import compose
from geon.launch.leave import guard
from geon.scripts import race
from geon.scripts.prepare_pysources import prepare
from geon.studies import shared as studies

SWEEPS = {"tiny": "speedrun", "124m": "speedrun_124m"}
NAMES = {"tiny": "speedrun_offline", "124m": "speedrun_offline_124m"}
MOST_MB = {"tiny": 130, "124m": 0}
"""Text that is tokenized: 30 million tokens are plenty for the tiny size; 0 takes all there is."""
YARDSTICK = "adamw"
"""Arm whose final loss is the target."""


def run(arguments: Sequence[str]) -> int:
    """Run the race and write what it says."""
    parser = studies.parser(__doc__, "speedrun")
    parser.add_argument("--size", choices=SWEEPS, help="tiny without a GPU, 124m with one")
    told = parser.parse_intermixed_args(arguments)
    size = told.size or ("124m" if torch.cuda.is_available() else "tiny")
    name = NAMES[size]
    config, _, jobs = studies.jobs_of(SWEEPS[size], told.overrides)
    first = compose(jobs[0].arguments)
    folder = Path(first.data.dir)
    if not (told.read or told.draw or told.dry_run):
        prepare(folder, most_mb=MOST_MB[size])
    if not told.draw:
        studies.finish(jobs, told, config)
        done = {job.arm: job for job in jobs if job.report is not None}
        if YARDSTICK not in done:
            raise UsageError(f"arm {YARDSTICK} has not finished: its final loss is the target")
        runs = race.race([job.folder for job in done.values()])
        named = dict(zip(done, runs.values(), strict=True))
        target = named[YARDSTICK]["points"][-1]["val_loss"]
        command = studies.command_line(told, f"speedrun --size {size}")
        facts = studies.meta(command, jobs) | {"steps": first.schedule.steps}
        studies.save(told.out, name, {"meta": facts, **race.verdict(named, target)})
        for job in done.values():
            print(f"card      {job.folder / 'card.md'}")
    found = studies.load(told.out, name)
    print(race.table(found))
    race.picture(found).savefig(told.out / f"{name}.png", dpi=110)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    return guard(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
