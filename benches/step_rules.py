"""Rows of benches.step --shapes: one optimizer step of several rules on the same matrices.

Our rules are those that recipes of configs/optim give to hidden matrices. Beside them run
`torch.optim.Muon`, and with --dion the Muon of a checkout of microsoft/dion.
"""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from geon.benches.count_operators import kernels, once, operators
from geon.configs.recipes import read
from geon.errors import UsageError
from geon.models import GPT, ModelShape
from geon.optim import HybridOptimizer, Role, Spectral
from geon.optim.routing import route_by

SHAPES = "768x12,1024x12,2048x4,4096x2"
"""Widths and layers that are measured where none are told."""
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon": ("muon", {}),
    "hybrid": ("hybrid", {"overrides.qk": None}),
    "hybrid_two_rules": ("hybrid", {}),
    "normuon": ("normuon", {}),
    "manifold_muon": ("manifold_muon", {}),
    "oneshot": ("manifold_muon", {"solver.method": "oneshot"}),
}
"""Rule -> recipe and settings. hybrid: the rule of its hidden matrices on all of them;
hybrid_two_rules: heads of q and k on DGram, as the recipe has it."""
LR, WARM = 0.02, 3

Row = dict[str, Any]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """Read widths and layers, e.g. 768x12,2048x4.

    Raises:
        UsageError: names the word.
    """
    found = []
    for word in text.split(","):
        width, _, layers = word.partition("x")
        if not (width.isdigit() and layers.isdigit() and int(width) and int(layers)):
            raise UsageError(f"--shapes '{word}' is not WIDTHxLAYERS, e.g. {SHAPES}")
        found.append((int(width), int(layers)))
    return found


class Matrices:
    """The hidden matrices of a GPT, gradients that all rules share, and points to start from.

    A start is semi-orthogonal, which is near every recipe's manifold; matrices of one shape start
    at the same.
    """

    def __init__(self, width: int, layers: int, device: str) -> None:
        heads = width // 128 if width % 128 == 0 else 4
        shape = ModelShape(vocab_size=256, context=64, n_layer=layers, n_head=heads, d_model=width)
        with torch.device("meta"):
            self.infos = [i for i in GPT(shape).infos if i.role is Role.HIDDEN]
        generator = Generator(device).manual_seed(0)
        shapes = dict.fromkeys(info.matrix_shape for info in self.infos)
        self._starts = {shape: Spectral().init(shape, generator) for shape in shapes}
        self._grads = [
            torch.randn(info.shape, generator=generator, device=device) for info in self.infos
        ]

    def params(self) -> dict[str, nn.Parameter]:
        """New parameters by name, with the shared gradients."""
        found = {}
        for info, grad in zip(self.infos, self._grads, strict=True):
            found[info.name] = nn.Parameter(self._starts[info.matrix_shape].clone())
            found[info.name].grad = grad
        return found


def ours(rule: str, matrices: Matrices) -> HybridOptimizer:
    """An optimizer of this package."""
    recipe, settings = RECIPES[rule]
    params: Mapping[str, Tensor] = matrices.params()
    routing = route_by(matrices.infos, read(recipe, LR, settings))
    return HybridOptimizer(routing.groups(params))


def torch_muon(matrices: Matrices) -> Optimizer:
    """Five steps in bf16, matrix by matrix."""
    return torch.optim.Muon(list(matrices.params().values()), lr=LR, weight_decay=0.0)


def dion_muon(matrices: Matrices, path: Path) -> Optimizer:
    """Muon of a checkout of microsoft/dion; by its Triton kernels on a GPU.

    Its signature changed over time: what it does not take is not said.
    """
    sys.path.insert(0, str(path))
    try:
        from dion import Muon  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(path))
    params = list(matrices.params().values())
    wanted = {"lr": LR, "weight_decay": 0.0, "nesterov": True, "use_polar_express": True}
    wanted["use_triton"] = params[0].is_cuda
    known = inspect.signature(Muon).parameters
    return Muon(params, **{key: value for key, value in wanted.items() if key in known})


def contestants(matrices: Matrices, dion: Path | None) -> dict[str, Optimizer]:
    """All optimizers by rule, each warmed up."""
    makers: dict[str, Callable[[], Optimizer]] = {
        **{rule: lambda rule=rule: ours(rule, matrices) for rule in RECIPES},
        "torch": lambda: torch_muon(matrices),
    }
    found = {rule: _warm(make()) for rule, make in makers.items()}
    if dion is not None:
        try:
            found["dion"] = _warm(dion_muon(matrices, dion))
        except Exception as error:  # another project's code, versions and compiler
            reason = (str(error).strip().splitlines() or [""])[0]
            print(f"dion: left out, {type(error).__name__}: {reason}", flush=True)
    return found


def _warm(optimizer: Optimizer) -> Optimizer:
    for _ in range(WARM):
        optimizer.step()
    return optimizer


def measure(width: int, layers: int, repeats: int, device: str, dion: Path | None) -> list[Row]:
    """Rows of one shape, one a rule: medians of steps that the rules take in turn.

    kernels: of one step on a GPU; operators that reach the dispatcher, views apart, on a CPU.
    """
    cuda = device == "cuda"
    optimizers = contestants(Matrices(width, layers, device), dion)
    times: dict[str, list[tuple[float, float]]] = {rule: [] for rule in optimizers}
    for _ in range(repeats):
        for rule, optimizer in optimizers.items():
            times[rule].append(once(optimizer, cuda))
    return [
        {
            "rule": rule,
            "width": width,
            "layers": layers,
            "milliseconds": median(whole for _, whole in times[rule]),
            "host_milliseconds": median(host for host, _ in times[rule]),
            "kernels": kernels(optimizer) if cuda else operators(optimizer).total(),
        }
        for rule, optimizer in optimizers.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows of one shape for people, with ratios over muon and, where it ran, over dion."""
    least = {row["rule"]: row["milliseconds"] for row in rows}
    lines = [f"width {rows[0]['width']}, {rows[0]['layers']} layers"]
    head = f"{'ms':>9} {'host ms':>9} {'kernels':>8} {'/ muon':>7} {'/ dion':>7}"
    lines.append(f"  {'':<17} {head}")
    for row in rows:
        spent = row["milliseconds"]
        over = f"{spent / least['dion']:7.2f}" if "dion" in least else f"{'-':>7}"
        lines.append(
            f"  {row['rule']:<17} {spent:9.2f} {row['host_milliseconds']:9.2f} "
            f"{row['kernels']:8} {spent / least['muon']:7.2f} {over}"
        )
    return "\n".join(lines)


def check_dion(path: Path | None) -> None:
    """Refuse a path that holds no checkout.

    Raises:
        UsageError: says what is missing.
    """
    if path is not None and not (path / "dion" / "__init__.py").is_file():
        raise UsageError(f"--dion '{path}' holds no dion/__init__.py: give a checkout's folder")


def run(shapes: str, repeats: int, device: str, dion: Path | None) -> list[Row]:
    """Measure and print all shapes.

    Raises:
        UsageError: names the option.
    """
    check_dion(dion)
    rows = []
    for width, layers in parse_shapes(shapes):
        found = measure(width, layers, repeats, device, dion)
        print(table(found), flush=True)
        rows += found
        if device == "cuda":
            torch.cuda.empty_cache()  # the next shape's are of other sizes
    return rows
