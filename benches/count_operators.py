"""Operators that one optimizer step dispatches, and files of optim/ that it visits.

python -m geon.benches.count_operators muon hybrid normuon
python -m geon.benches.count_operators muon --device cuda --width 768 --repeats 20

Counts what reaches PyTorch's dispatcher in the third step of a recipe on a GPT of 12 layers, views
apart, because they launch no kernel. On a GPU each is about one kernel, and a step cannot be faster
than the host issues them. With --repeats it times whole steps too: until `step()` returns (host),
and until the device is done.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from geon.benches import results
from geon.engine import build
from geon.engine.metrics import hardware
from geon.engine.parallel import Parallel
from geon.launch.compose import compose
from geon.launch.env import Env
from geon.launch.leave import guard
from geon.optim import HybridOptimizer
from geon.scripts.flags import whole

VIEWS = frozenset(
    [
        "_unsafe_view",
        "alias",
        "as_strided",
        "detach",
        "diagonal",
        "expand",
        "permute",
        "select",
        "slice",
        "split",
        "squeeze",
        "transpose",
        "unbind",
        "unsqueeze",
        "view",
    ]
)
ROOT = Path(__file__).resolve().parents[1]


class _Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one."""
        space, name = str(func).split(".")[:2]
        if space != "profiler":
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def make(recipe: str, device: str, layers: int, width: int) -> HybridOptimizer:
    """A recipe's optimizer over a GPT, with random gradients."""
    config = compose(
        [
            f"optim={recipe}",
            "parallel=single",
            f"device={device}",
            f"model.n_layer={layers}",
            f"model.d_model={width}",
            f"model.n_head={max(1, width // 128) if width > 128 else 4}",
            "data.vocab_size=256",
        ]
    )
    model = build.make_model(config.model)
    routing = build.make_routing(model, config.optim)
    Parallel(config.parallel, Env(), torch.device(device)).place(model)
    build.initialise(model, routing, 0)
    optimizer = build.make_optimizer(model, routing, config)
    for _, param in optimizer.named_parameters():
        param.grad = torch.randn_like(param)
    return optimizer


def operators(optimizer: Optimizer) -> Counter[str]:
    """Operators of one step by name, views apart."""
    with _Operators() as counter:
        optimizer.step()
    return Counter({name: n for name, n in counter.found.items() if name not in VIEWS})


def kernels(optimizer: Optimizer) -> int:
    """Kernels that one step runs on a CUDA device; copies and fills are none."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    return sum(map(is_kernel, profiler.events()))


def is_kernel(event: Any) -> bool:
    """Whether what a profiler saw is a kernel: not an operator, a copy, or a named range."""
    return (
        event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.key.startswith(("Memcpy", "Memset"))
    )


def visited(optimizer: HybridOptimizer) -> list[str]:
    """Files of optim/ that have a function called in one step."""
    files: set[str] = set()

    def take(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    sys.setprofile(take)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    inside = [Path(file) for file in files if file.startswith(str(ROOT / "optim"))]
    return sorted(file.relative_to(ROOT / "optim").as_posix() for file in inside)


def once(optimizer: Optimizer, cuda: bool) -> tuple[float, float]:
    """Milliseconds of a step: until it returns, and until the device, idle before, is done."""
    if cuda:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
    begin = time.perf_counter()
    optimizer.step()
    host = 1e3 * (time.perf_counter() - begin)
    if not cuda:
        return host, host
    stop.record()
    stop.synchronize()
    return host, start.elapsed_time(stop)


def timed(optimizer: Optimizer, repeats: int, cuda: bool) -> dict[str, float]:
    """Median milliseconds of a step, until it returns and until the device is done."""
    host, whole = zip(*(once(optimizer, cuda) for _ in range(repeats)), strict=True)
    return {"host_milliseconds": median(host), "milliseconds": median(whole)}


def main() -> int:
    """Count, print a line a recipe, and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=["muon", "hybrid", "normuon"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=whole(), default=12)
    parser.add_argument("--width", type=whole(), default=64)
    parser.add_argument("--repeats", type=whole(0), default=0, help="also time so many steps")
    parser.add_argument("--nonfinite", default="raise", help="raise, skip or ignore")
    parser.add_argument("--verbose", action="store_true", help="list operators and files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    for recipe in arguments.recipes:
        optimizer = make(recipe, arguments.device, arguments.layers, arguments.width)
        optimizer.nonfinite = arguments.nonfinite
        for _ in range(2):
            optimizer.step()
        found, files = operators(optimizer), visited(optimizer)
        row = {"recipe": recipe, "operators": sum(found.values()), "files": len(files)}
        if arguments.repeats:
            row |= timed(optimizer, arguments.repeats, arguments.device == "cuda")
        rows.append(row)
        print(
            ", ".join(
                f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
            )
        )
        if arguments.verbose:
            print(f"  {dict(found.most_common())}\n  {files}")
    if arguments.json:
        told = {k: v for k, v in vars(arguments).items() if k != "json"}
        meta = {"hardware": hardware(arguments.device), "torch": torch.__version__, **told}
        content = {"rows": rows, "meta": meta}
        results.write(arguments.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
