"""What a run does about bad numbers: stop, leave a step out, or go back to a checkpoint."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geon.configs.choices import Nonfinite, Policy
from geon.configs.schema import Config, HealthConfig, Layouts
from geon.engine import checkpoint
from geon.errors import UsageError
from geon.optim import Baseline, HybridOptimizer
from geon.optim.health import BadNumber
from geon.optim.routing import Routing

if TYPE_CHECKING:
    from geon.engine.trainer import Trainer


def check_health(config: Config, routing: Routing) -> None:
    """Refuse policies that could not be followed.

    Raises:
        UsageError: names the keys.
    """
    health, nonfinite = config.health, config.optim.nonfinite
    policy, chosen = health.policy, f"health.policy={health.policy.value}"
    if nonfinite is Nonfinite.skip:
        raise UsageError(
            "optim.nonfinite=skip is for optimizers of other programs: with train.py set "
            "health.policy=skip, which counts the steps in the log and stops after "
            "health.max_skips in a row"
        )
    if nonfinite is Nonfinite.ignore:
        looked = [f"health.spike={health.spike:g}"] if health.spike else []
        looked += [chosen] if policy is not Policy.stop else []
        if looked:
            raise UsageError(
                f"{looked[0]} with optim.nonfinite=ignore: gradients are not looked at; set "
                f"{looked[0].split('=')[0]}={'0' if health.spike else 'stop'}, or "
                "optim.nonfinite=raise"
            )
    if policy is Policy.stop:
        return
    if config.parallel.layout is Layouts.deepspeed:
        raise UsageError(
            f"{chosen} with parallel=deepspeed: its engine has counted and cleared by the time a "
            "bad gradient is found; set health.policy=stop, or use parallel=fsdp"
        )
    if policy is Policy.rewind and not config.checkpoint.every:
        raise UsageError(
            f"{chosen} with checkpoint.every=0: there would be no checkpoint to go back to; set "
            "checkpoint.every, or health.policy=skip"
        )
    if policy is Policy.rewind and any(isinstance(r, Baseline) for r in routing.rules.values()):
        raise UsageError(
            f"{chosen}: another package's optimizer (rule=baseline) cannot go back within a run; "
            "set health.policy=skip"
        )


class Health:
    """Follows the policy of a run, and counts.

    Positions are those of the data: position s is read by step s + 1.

    Attributes:
        skipped: positions left out so far, of the steps that lie behind.
        banned: positions to be left out when they come again.
        restore: loads a checkpoint into the trainer; set before the run by who can.
        wait_for_saves: waits until what a thread saves is committed; set likewise.
    """

    def __init__(self, config: HealthConfig) -> None:
        self.config = config
        self.skipped: list[int] = []
        self.banned: set[int] = set()
        self.restore: Callable[[Path], None] | None = None
        self.wait_for_saves: Callable[[], None] = lambda: None
        self.rewinds = 0
        self._in_a_row = 0

    def facts(self, optimizer: HybridOptimizer) -> dict[str, Any]:
        """JSON for a checkpoint: "skipped" positions, and the "health" that `load` takes."""
        found = {"in_a_row": self._in_a_row, **optimizer.watch.facts()}
        return {"skipped": list(self.skipped), "health": found}

    def load(self, facts: Mapping[str, Any], optimizer: HybridOptimizer) -> None:
        """Go on from what `facts` gave; a checkpoint of before has none."""
        self.skipped = list(facts.get("skipped", []))
        self._in_a_row = int(facts.get("health", {}).get("in_a_row", 0))
        optimizer.watch.load(facts.get("health", {}))

    def leave_out(self, trainer: "Trainer", why: str) -> None:
        """Count the step of the trainer's position as one that is left out."""
        self.skipped.append(trainer.step)
        self._in_a_row += 1
        trainer.log("skip", {"position": trainer.step, "why": why})
        if trainer.run.parallel.env.main:
            print(f"step {trainer.step + 1} is left out: {why}", flush=True)

    def went_well(self) -> None:
        """Note that a step was taken."""
        self._in_a_row = 0

    def refused(self, trainer: "Trainer", error: FloatingPointError) -> None:
        """A step was refused with nothing changed: leave it out, where that is the policy.

        Raises:
            FloatingPointError: it is not.
        """
        late = getattr(error, "late", True)
        if late or self.config.policy is not Policy.skip:
            raise error
        if self._in_a_row >= self.config.max_skips:
            raise BadNumber(
                "gradient", f"{error}. {self._in_a_row} steps in a row were left out before it "
                "(health.max_skips)"
            ) from error  # fmt: skip
        self.leave_out(trainer, str(error).split(":")[0])

    def recover(self, trainer: "Trainer", error: FloatingPointError) -> None:
        """Go back to the newest checkpoint of before, where that is the policy.

        Every rank must call. A bad update is found a step late at most, and not saved before.

        Raises:
            FloatingPointError: it is not, or there is none, or too often; on every rank, naming
                the step.
        """
        late = getattr(error, "late", True)
        position = max(0, trainer.step - 1 if late else trainer.step)
        place = trainer.folder / "checkpoints"
        with suppress(FloatingPointError):  # what was on its way was as bad, and is not saved
            self.wait_for_saves()
        found = [p for p in checkpoint.committed(place) if _step(p) <= position]
        (newest, *_) = trainer.run.parallel.gather(str(found[-1]) if found else "")
        said = f"step {position + 1}: {error}"
        if self.config.policy is not Policy.rewind:
            rest = f"; the newest checkpoint is {newest}" if newest else "; there is no checkpoint"
            raise FloatingPointError(said + rest) from None
        if not newest or self.restore is None:
            raise FloatingPointError(f"{said}; there is no checkpoint to go back to") from None
        if self.rewinds >= self.config.max_rewinds:
            raise FloatingPointError(
                f"{said}; the run went back {self.rewinds} times before (health.max_rewinds); the "
                f"newest checkpoint is {newest}"
            ) from None
        self.rewinds += 1
        self.banned.add(position)
        trainer.run.optimizer.zero_grad(set_to_none=True)
        self.restore(Path(newest))
        trainer.rewound()
        record = {"position": position, "to": trainer.step, "why": str(error).split(":")[0]}
        trainer.log("rewind", record)
        if trainer.run.parallel.env.main:
            print(f"{said}; back at step {trainer.step}", flush=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
