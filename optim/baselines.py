"""Ready-made optimizers to compare with: name -> factory over torch.optim and pytorch-optimizer."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from geon.errors import UsageError, nearest
from geon.optim.entries import EntryRule, State

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


@dataclass(eq=False)
class Baseline(EntryRule):
    """A param group that another package's optimizer steps, on whole parameters.

    Attributes:
        key: name in BASELINES.
        options: keyword arguments of its class, over the table's and its own defaults.
        curvature: an estimate of the Hessian's diagonal by parameter, for the next step alone.
    """

    key: str
    options: Mapping[str, Any] = field(default_factory=dict)
    curvature: Mapping[Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _optimizers: dict[str, torch.optim.Optimizer] = field(
        default_factory=dict, init=False, repr=False
    )
    """The other package's optimizers, by param group."""

    cuts = False

    def __post_init__(self) -> None:
        if self.key not in BASELINES:
            raise UsageError(
                f"rule=baseline: baseline '{self.key}' is not one of {', '.join(BASELINES)}."
                f"{nearest(self.key, list(BASELINES))}"
            )

    @property
    def origin(self) -> Origin:
        """Package, class and settings that the baseline comes from."""
        return BASELINES[self.key]

    @property
    def name(self) -> str:
        """Name of the rule: package and class of the optimizer."""
        return f"{self.origin.package}.{self.origin.cls}"

    def start(self, params: Sequence[Tensor], lr: float) -> torch.optim.Optimizer:
        """Make the other package's optimizer over some parameters.

        Raises:
            UsageError: its package is not installed, or it does not take an option.
        """
        origin = self.origin
        try:
            module = importlib.import_module(origin.package)
        except ModuleNotFoundError:
            raise UsageError(
                f"baseline '{self.key}' comes from {origin.package.replace('_', '-')}, which is "
                "not installed: pip install 'geon[baselines]'"
            ) from None
        settings = {**origin.settings, **self.options}
        try:
            made: torch.optim.Optimizer = getattr(module, origin.cls)(
                list(params), lr=lr, **settings
            )
        except (TypeError, ValueError) as error:
            raise UsageError(
                f"baseline '{self.key}': {self.name} refuses {settings}: {error}"
            ) from None
        return made

    def begin(self, group: str, params: Sequence[Tensor], lr: float) -> None:
        """Make the other package's optimizer for a param group, and keep it; not of empty ones."""
        if members := [param for param in params if param.numel()]:
            self._optimizers[group] = self.start(members, lr)

    def new_state(self, param: Tensor) -> State:
        """Empty state: the other package's optimizer makes its own as it steps."""
        return {}

    def step(
        self,
        group: dict[str, Any],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
    ) -> None:
        """Step the parameters that have a gradient, from the state that is kept here."""
        members = [param for param in group["params"] if param.requires_grad and param.numel()]
        if not members:
            return
        if group["name"] not in self._optimizers:
            self.begin(group["name"], members, group["lr"])
        optimizer = self._optimizers[group["name"]]
        (inner,) = optimizer.param_groups
        # Some count their steps there; so copies and state dicts hold all that there is.
        inner |= {**group.get("numbers", {}), "lr": group["lr"], "params": members}
        for param, grad, state in zip(params, grads, states, strict=True):
            param.grad, optimizer.state[param] = grad, state
        given, self.curvature = self.curvature, None
        step: Any = optimizer.step
        step(**({"hessian": [given[param] for param in members]} if given is not None else {}))
        group["numbers"] = {k: v for k, v in inner.items() if k not in ("params", "lr")}

    def counted(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers of a param group that the other package's optimizer changed, such as a count."""
        optimizer = self._optimizers.get(group["name"])
        begun = optimizer.defaults if optimizer is not None else {}
        numbers = group.get("numbers", {})
        return {k: v for k, v in numbers.items() if k not in begun or begun[k] != v}

    @torch.enable_grad()
    def example(self, param: Tensor) -> State:
        """State of one step of a copy of a parameter: what kinds of objects it is made of."""
        copy = torch.nn.Parameter(param.detach().clone())
        optimizer: Any = self.start([copy], 1e-3)
        copy.grad = torch.zeros_like(copy)
        given = {"hessian": [torch.zeros_like(copy)]} if self.origin.curvature_every else {}
        optimizer.step(**given)
        return dict(optimizer.state[copy])

    def describe(self) -> str:
        """Describe the rule in one line, for tables."""
        settings = {**self.origin.settings, **self.options}
        told = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items()]
        told = [text for text in told if str(_NEVER) not in text]
        return ", ".join([self.name, *told])
