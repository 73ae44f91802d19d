"""A script of modded-nanogpt's track 3, run as it is, and watched. Imports nothing of geon.

torchrun --standalone --nproc_per_node=1 benches/track_run.py SCRIPT --steps 50 --seed 0 --out DIR

Not a line of the script is changed. It is watched through what it calls in torch: `compile` of the
model shows which module that is, `backward` shows the losses, and steps of optimizers end a step.
Writes weights.pt (the weights by name, before the first step) and losses.json (the sum of what
`backward` was called on, by step), and ends the script at the first loss after the last step.
"""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from geon.launch.leave import guard


class Enough(BaseException):
    """All steps that were asked for are there."""


class Watch:
    """Initial weights, and the sum of losses of each step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.sums: list[Tensor] = []
        self.weights: dict[str, Tensor] = {}
        self._model: nn.Module | None = None
        self._stepped = True

    def compiled(self, model: nn.Module) -> None:
        """The script compiles its model."""
        self._model = model

    def stepped(self, *_: Any) -> None:
        """An optimizer has stepped: the next loss is of another step."""
        self._stepped = True

    def backward(self, loss: Tensor) -> None:
        """The script goes back from a loss, before it does.

        Raises:
            Enough: it is of the step after the last.
        """
        if self._stepped:
            if len(self.sums) == self.steps:
                raise Enough
            if not self.sums:
                self._keep_weights()
            self.sums.append(torch.zeros((), dtype=torch.float64, device=loss.device))
            self._stepped = False
        self.sums[-1] += loss.detach()

    def _keep_weights(self) -> None:
        if self._model is None:
            raise RuntimeError("the script has compiled no model before its first backward")
        named = self._model.named_parameters()
        self.weights = {name: p.detach().cpu().clone() for name, p in named}


def run(script: Path, watch: Watch) -> None:
    """Run a script until the watch has seen enough, or it ends by itself."""
    compile_, backward = nn.Module.compile, Tensor.backward

    def compile_watched(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        watch.compiled(self)
        compile_(self, *args, **kwargs)

    def backward_watched(self: Tensor, *args: Any, **kwargs: Any) -> None:
        watch.backward(self)
        backward(self, *args, **kwargs)

    hook = register_optimizer_step_post_hook(watch.stepped)
    nn.Module.compile, Tensor.backward = compile_watched, backward_watched  # type: ignore
    sys.argv[1:] = []
    sys.path[0] = str(script.parent)
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Enough:
        pass
    finally:
        nn.Module.compile, Tensor.backward = compile_, backward  # type: ignore[method-assign]
        hook.remove()


def main() -> None:
    """Command line, under torchrun with one process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("script", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    told = parser.parse_args()
    torch.manual_seed(told.seed)
    watch = Watch(told.steps)
    run(told.script.absolute(), watch)
    torch.save(watch.weights, told.out / "weights.pt")
    sums = [float(one) for one in watch.sums]
    (told.out / "losses.json").write_text(json.dumps(sums) + "\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(guard(main))
