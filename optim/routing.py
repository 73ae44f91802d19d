"""Who steps what: a recipe's rules over a model's parameters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from geon.configs.choices import Budget, RuleKind
from geon.configs.recipes import OptimConfig, RuleConfig
from geon.errors import UsageError
from geon.optim.entries import EntryRule
from geon.optim.groups import Group, check_idle
from geon.optim.matrices import check_per_head
from geon.optim.modular import Network
from geon.optim.modular.budget import step_factors
from geon.optim.roles import Block, ParamInfo, Role
from geon.optim.router import Route, route, table
from geon.optim.rule import Rule
from geon.optim.words import make_ladder, make_rule

ROLES = {
    "hidden": {Role.HIDDEN},
    "embedding": {Role.EMBEDDING},
    "head": {Role.HEAD},
    "tied": {Role.TIED},
    "rest": {Role.GAIN, Role.BIAS, Role.SCALAR, Role.OTHER},
}
"""Which roles each rule of a recipe takes."""


@dataclass(frozen=True)
class Routing:
    """Who steps what: rules by route name, and the route of each parameter.

    Attributes:
        note: what else there is to say of the rates, for tables.
    """

    infos: list[ParamInfo]
    assigned: dict[str, str]
    rules: dict[str, Rule | EntryRule]
    configs: dict[str, RuleConfig]
    note: str = ""

    def rule(self, info: ParamInfo) -> Rule | EntryRule:
        """Rule of a parameter."""
        return self.rules[self.assigned[info.name]]

    def blocks(self, info: ParamInfo) -> tuple[Block, ...]:
        """The blocks that its rule steps in a parameter."""
        return info.blocks(self.per_head(info))

    def per_head(self, info: ParamInfo) -> bool:
        """Whether the heads of a parameter are stepped one by one."""
        return self.configs[self.assigned[info.name]].per_head

    def members(self, route: str) -> list[ParamInfo]:
        """Parameters of a route, in the order of the model."""
        return [info for info in self.infos if self.assigned[info.name] == route]

    def groups(self, params: Mapping[str, Tensor]) -> list[Group]:
        """Param groups over a model's parameters, or what a framework holds in their place."""
        return [
            Group(
                name,
                rule,
                self.configs[name].lr,
                [(info, params[info.name]) for info in self.members(name)],
                self.configs[name].per_head,
                self.configs[name].idle.value,
            )
            for name, rule in self.rules.items()
        ]

    def table(self) -> str:
        """Table of the model's roles and routes, for people."""
        described = {
            name: f"lr {self.configs[name].lr:g}, {rule.describe()}"
            for name, rule in self.rules.items()
        }
        per_head = [name for name, config in self.configs.items() if config.per_head]
        found = table(self.infos, self.assigned, described, per_head)
        return f"{found}\n{self.note}" if self.note else found

    def to_dict(self) -> list[dict[str, Any]]:
        """Roles and routes in plain containers, for JSON."""
        return [
            {
                "name": info.name,
                "shape": list(info.shape),
                "role": str(info.role),
                "splits": list(info.splits),
                "matrices": sum(form.count for b in self.blocks(info) for form in b.forms),
                "route": self.assigned[info.name],
                "rule": self.rule(info).describe(),
                "lr": self.configs[self.assigned[info.name]].lr,
            }
            for info in self.infos
        ]


def route_by(
    infos: Sequence[ParamInfo],
    recipe: OptimConfig,
    rate_scale: Callable[[ParamInfo], float] = lambda _: 1.0,
    network: Callable[[], Network] | None = None,
) -> Routing:
    """Give every parameter the rule that a recipe has for it.

    rate_scale: what an AdamW rate is multiplied by for a parameter (muP).
    network: gives the model as a tree of modules, for budget=modular.

    Raises:
        UsageError: an unknown norm or manifold, a pair without a solver, a parameter no rule takes,
            heads for AdamW, a budget without effect.
    """
    overrides = sorted(recipe.overrides.items(), key=lambda item: item[1].optional)
    routes = [
        # A glob that may match nothing serves many models: heads are not guessed for one of them.
        Route(name, pattern=o.pattern, optional=o.optional, with_heads=o.optional and o.per_head)
        for name, o in overrides
    ]
    routes += [Route(name, frozenset(roles)) for name, roles in ROLES.items()]
    assigned = route(infos, routes)
    configs: dict[str, RuleConfig] = {
        **{name: getattr(recipe, name) for name in ROLES},
        **recipe.overrides,
    }
    used = {
        name: _scaled(config, [i for i in infos if assigned[i.name] == name], name, rate_scale)
        for name, config in configs.items()
        if name in assigned.values()
    }
    note = ""
    if recipe.budget is Budget.modular:
        assigned, used, note = _shared_out(infos, assigned, used, network)
    ladder = make_ladder(recipe.solver)
    rules = {
        name: make_rule(config, recipe.polar, ladder, f"optim.{_base(name)}", recipe.compile)
        for name, config in used.items()
    }
    if recipe.compile and not any(isinstance(rule, Rule) for rule in rules.values()):
        raise UsageError("optim.compile=true has no effect: no rule of this recipe steps matrices")
    for name, rule in rules.items():
        check_per_head(rule, used[name].per_head, f"optim.{_base(name)}")
        check_idle(rule, used[name].idle.value, f"optim.{_base(name)}")
    return Routing(list(infos), assigned, rules, used, note)


def _shared_out(
    infos: Sequence[ParamInfo],
    assigned: Mapping[str, str],
    used: Mapping[str, RuleConfig],
    network: Callable[[], Network] | None,
) -> tuple[dict[str, str], dict[str, RuleConfig], str]:
    """Cut routes of hidden matrices by their factors of the budget: hidden*0.5774, and so on.

    A param group has one rate; so matrices of a route whose step sizes differ are of several.
    """
    own = {
        info.name
        for info in infos
        if info.role is Role.HIDDEN and used[assigned[info.name]].rule is RuleKind.steepest
    }
    if not own or network is None:
        raise UsageError(
            "optim.budget=modular has no effect: it shares step sizes out over hidden matrices "
            "that a steepest rule steps, and this recipe has none; leave it out"
        )
    factors = step_factors(network(), own)
    routes = {
        name: f"{route}*{factors[name]:.4g}" if name in factors else route
        for name, route in assigned.items()
    }
    found = {}
    for base, config in used.items():
        members = {name: route for name, route in routes.items() if assigned[name] == base}
        for name in members:
            factor = float(f"{factors.get(name, 1.0):.4g}")
            found[routes[name]] = replace(config, lr=config.lr * factor)
    low, high = min(factors.values()), max(factors.values())
    note = (
        f"budget: rates of {len(factors)} hidden weights are times {low:.4g} to {high:.4g}, by "
        "the masses and sensitivities of the modular norm; their geometric mean is that of flat"
    )
    return routes, found, note


def _base(name: str) -> str:
    """The route that a route of the budget is a part of."""
    return name.partition("*")[0]


def _scaled(
    config: RuleConfig,
    members: Sequence[ParamInfo],
    name: str,
    rate_scale: Callable[[ParamInfo], float],
) -> RuleConfig:
    """The config of a route with its rate worked out: lr_scale, and the model's parametrisation.

    Steepest rules do without the latter: their norms know the shape.
    """
    config = replace(config, lr=config.lr * config.lr_scale, lr_scale=1.0)
    if config.rule is RuleKind.steepest:
        return config
    scales = {rate_scale(info) for info in members}
    if len(scales) > 1:
        raise UsageError(
            f"model.mup=true: optim.overrides.{name} holds hidden matrices and other parameters, "
            "whose rates scale differently with the width: give them patterns of their own"
        )
    return replace(config, lr=config.lr * scales.pop())
