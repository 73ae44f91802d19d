"""Ready-made optimizers to compare with: name -> factory over torch.optim and pytorch-optimizer."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError, nearest

_NEVER = 2**62


@dataclass(frozen=True)
class Origin:
    """Where a baseline comes from.

    Attributes:
        package: torch.optim or pytorch_optimizer.
        cls: class in it.
        settings: what differs from the class's own defaults.
        curvature_every: steps between the estimates of the Hessian's diagonal that it is given.
    """

    package: str
    cls: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    curvature_every: int = 0


# pytorch_optimizer's SCION(norm_type="spectral") silently steps by the identity: ours is used.
BASELINES: dict[str, Origin] = {
    "sgd": Origin("torch.optim", "SGD"),
    "momentum": Origin("torch.optim", "SGD", {"momentum": 0.9}),
    "nesterov": Origin("torch.optim", "SGD", {"momentum": 0.9, "nesterov": True}),
    "adagrad": Origin("torch.optim", "Adagrad"),
    "rmsprop": Origin("torch.optim", "RMSprop", {"alpha": 0.95}),
    "adam": Origin("torch.optim", "Adam", {"betas": (0.9, 0.95)}),
    "adafactor": Origin("torch.optim", "Adafactor"),
    "torch_muon": Origin("torch.optim", "Muon"),
    "lars": Origin("pytorch_optimizer", "LARS"),
    # Its own clipping would come on top of optim.max_norm.
    "lamb": Origin("pytorch_optimizer", "Lamb", {"betas": (0.9, 0.95), "max_grad_norm": 0.0}),
    "lion": Origin("pytorch_optimizer", "Lion"),
    # Sophia-G (arXiv 2305.14342): gamma 0.05, estimates by sampled labels. The class would
    # estimate by second derivatives, which fused attention kernels lack, so it never gets to.
    "sophia": Origin(
        "pytorch_optimizer",
        "SophiaH",
        {"betas": (0.965, 0.99), "p": 0.05, "update_period": _NEVER},
        curvature_every=10,
    ),
    "shampoo": Origin(
        "pytorch_optimizer",
        "ScalableShampoo",
        {"preconditioning_compute_steps": 10, "start_preconditioning_step": 10},
    ),
    "soap": Origin("pytorch_optimizer", "SOAP", {"weight_decay": 0.0}),
}


@dataclass(frozen=True)
class Baseline:
    """A param group that another package's optimizer steps, on whole parameters.

    Attributes:
        name: key of BASELINES.
        options: keyword arguments of its class, over the table's and its own defaults.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in BASELINES:
            raise UsageError(
                f"baseline '{self.name}' is not one of {', '.join(BASELINES)}."
                f"{nearest(self.name, list(BASELINES))}"
            )

    @property
    def origin(self) -> Origin:
        """Where it comes from."""
        return BASELINES[self.name]

    def start(self, params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        """Make the optimizer.

        Raises:
            UsageError: its package is not installed, or it does not take an option.
        """
        origin = self.origin
        try:
            module = importlib.import_module(origin.package)
        except ModuleNotFoundError:
            raise UsageError(
                f"baseline '{self.name}' comes from {origin.package.replace('_', '-')}, which is "
                "not installed: pip install -c constraints.txt -e '.[baselines]'"
            ) from None
        settings = {**origin.settings, **self.options}
        try:
            made: torch.optim.Optimizer = getattr(module, origin.cls)(
                list(params), lr=lr, **settings
            )
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"baseline '{self.name}': {origin.package}.{origin.cls} refuses {settings}: {error}"
            ) from None
        return made

    def describe(self) -> str:
        """One line for tables."""
        settings = {**self.origin.settings, **self.options}
        told = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items()]
        told = [text for text in told if str(_NEVER) not in text]
        return ", ".join([f"{self.origin.package}.{self.origin.cls}", *told])


class Guests:
    """The optimizers of baseline groups, by group name."""

    def __init__(self) -> None:
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._every: dict[str, int] = {}
        self._curvature: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._optimizers)

    def add(self, group: Mapping[str, Any], rule: Baseline) -> None:
        """Make the optimizer of a param group."""
        self._optimizers[group["name"]] = rule.start(group["params"], group["lr"])
        self._every[group["name"]] = rule.origin.curvature_every

    def step(self, group: Mapping[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """Step a group at its present lr; returns the state of each parameter."""
        name, optimizer = group["name"], self._optimizers[group["name"]]
        for inner in optimizer.param_groups:
            inner["lr"] = group["lr"]
        step: Any = optimizer.step
        step(**({"hessian": self._curvature.pop(name)} if name in self._curvature else {}))
        return {param: optimizer.state[param] for param in group["params"]}

    def curvature_due(self, step: int) -> bool:
        """Whether a group wants an estimate of the Hessian's diagonal for this step, from 0 on."""
        return any(every and step % every == 0 for every in self._every.values())

    def take_curvature(
        self, groups: Sequence[Mapping[str, Any]], diagonal: Mapping[str, Tensor]
    ) -> None:
        """Keep an estimate of the Hessian's diagonal, by parameter name, for the coming step."""
        for group in groups:
            if self._every.get(group["name"]):
                self._curvature[group["name"]] = [diagonal[name] for name in group["names"]]
