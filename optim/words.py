"""From words (configs/optim/*.yaml) to rules: norms, manifolds, polar factors, solvers."""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeVar

from geon.configs.choices import RuleKind
from geon.configs.recipes import PolarConfig, RuleConfig, SolverConfig
from geon.errors import UsageError, nearest
from geon.optim.adamw import AdamW
from geon.optim.baselines import Baseline
from geon.optim.entries import EntryRule
from geon.optim.finishes import FINISHES, Finish
from geon.optim.linalg import Precision
from geon.optim.manifolds import MANIFOLDS, Manifold
from geon.optim.norms import NORMS, Norm, Spectral
from geon.optim.polar import Polar
from geon.optim.row_adam import RowAdam
from geon.optim.rule import Rule
from geon.optim.solvers import Ladder

T = TypeVar("T")


def make_rule(
    config: RuleConfig, polar: PolarConfig, ladder: Ladder, key: str, compiled: bool = False
) -> Rule | EntryRule:
    """Build one rule; `key` is its place in the config, for messages."""
    if config.rule in (RuleKind.adamw, RuleKind.adam_rows) and len(config.betas) != 2:
        raise UsageError(f"{key}.betas needs two numbers, got {config.betas}")
    if config.rule is RuleKind.adamw:
        return AdamW((config.betas[0], config.betas[1]), config.eps, config.weight_decay)
    try:
        if config.rule is RuleKind.adam_rows:
            norm: Any = _make_norm(config, polar, key)
            betas = config.betas[0], config.betas[1]
            return RowAdam(norm, config.radius, betas, config.weight_decay)
        if config.rule is RuleKind.baseline:
            return Baseline(config.baseline, config.options)
        return Rule(
            norm=_make_norm(config, polar, key),
            manifold=_make_manifold(config, key),
            momentum=config.momentum,
            nesterov=config.nesterov,
            radius=config.radius,
            decay=config.weight_decay,
            ladder=ladder,
            finishes=_make_finishes(config, key),
            second_moment=config.second_moment,
            even_rows=config.even_rows,
            compiled=compiled,
        )
    except ValueError as error:
        raise UsageError(f"{key}: {error}" if key not in str(error) else str(error)) from None


def _make_norm(config: RuleConfig, polar: PolarConfig, key: str) -> Norm:
    if config.norm not in NORMS:
        raise UsageError(
            f"{key}.norm '{config.norm}' is not one of {', '.join(NORMS)}."
            f"{nearest(config.norm, list(NORMS))}"
        )
    if config.norm != "spectral":
        return NORMS[config.norm]()
    words = ("auto", *Precision)
    if polar.dtype not in words:
        raise UsageError(f"optim.polar.dtype '{polar.dtype}' is not one of {', '.join(words)}")
    precision = None if polar.dtype == "auto" else Precision(polar.dtype)
    steps = Polar(polar.coefficients, polar.steps, precision, polar.accuracy, polar.lower)
    return Spectral(scale=config.spectral_scale, polar=steps)


def _make_manifold(config: RuleConfig, key: str) -> Manifold:
    if config.manifold not in MANIFOLDS:
        raise UsageError(
            f"{key}.manifold '{config.manifold}' is not one of {', '.join(MANIFOLDS)}."
            f"{nearest(config.manifold, list(MANIFOLDS))}"
        )
    radius = {} if config.manifold == "euclidean" else {"radius": config.radius}
    make = MANIFOLDS[config.manifold]
    return _with_options(make, config.manifold, radius, config.manifold_options, "manifold")


def _make_finishes(config: RuleConfig, key: str) -> tuple[Finish, ...]:
    found = []
    for name, options in config.finishes.items():
        if name not in FINISHES:
            raise UsageError(
                f"{key}.finishes '{name}' is not one of {', '.join(FINISHES)}."
                f"{nearest(name, list(FINISHES))}"
            )
        if options is not None:
            found.append(_with_options(FINISHES[name], name, {}, options, "finish"))
    return tuple(found)


def _with_options(
    make: Callable[..., T], name: str, own: dict[str, Any], options: Any, kind: str
) -> T:
    """Call with options from the config, and name those that it takes where one is wrong."""
    if not isinstance(options, dict):
        raise ValueError(f"{kind} {name}: options must be a mapping, got {options!r}")
    bound = {*own, *getattr(make, "keywords", {})}  # of a partial: what its name promises
    taken = {word: p for word, p in signature(make).parameters.items() if word not in bound}
    key = "finishes" if kind == "finish" else f"{kind}_options"
    if unknown := set(options) - set(taken):
        raise ValueError(
            f"{kind} {name} takes {', '.join(taken) or 'no options'}, not "
            f"{', '.join(map(str, unknown))} ({key})"
        )
    for word, value in options.items():
        number = taken[word].annotation is float
        if isinstance(value, bool) or not isinstance(value, (int, float) if number else str):
            raise ValueError(
                f"{kind} {name}: {word} must be a {'number' if number else 'word'}, got {value!r} "
                f"({key})"
            )
    return make(**own, **options)


def make_ladder(config: SolverConfig) -> Ladder:
    """Build the choice of solver.

    Raises:
        UsageError: an unknown word, or bf16 products.
    """
    if config.products not in {"auto", *Precision}:
        raise UsageError(
            f"optim.solver.products '{config.products}' is not one of auto, fp32, bf16x3"
        )
    precision = None if config.products == "auto" else Precision(config.products)
    return Ladder(config.method, config.refine, config.form, precision)
