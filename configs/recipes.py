"""Rules in words: the schema of configs/optim/*.yaml, and the reading of them without Hydra."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from geon.configs.choices import Budget, Idle, Init, MomentumDtype, Nonfinite, RuleKind
from geon.errors import UsageError, nearest, shown

ROOT = Path(__file__).resolve().parent / "optim"
MISSING: Any = "???"
"""What omegaconf takes for a value that a yaml file must give."""
T = TypeVar("T")


@dataclass
class RuleConfig:
    """How one route is stepped; see optim/rule.py and optim/adamw.py."""

    rule: RuleKind = RuleKind.steepest
    lr: float = MISSING
    """Peak learning rate. On a manifold: radians a step."""
    lr_scale: float = 1.0
    """Multiplies lr, so that rates which follow optim.lr keep a ratio to it."""
    cooldown: float = 0.0
    """Share of the run, at its end, over which this rate decays; 0 takes schedule.decay. Read by
    runs with schedule=linear."""
    weight_decay: float = 0.0
    """Decoupled, per unit of lr. 1 makes a steepest rule Scion's constrained form."""
    norm: str = "spectral"
    manifold: str = "euclidean"
    manifold_options: dict[str, Any] = field(default_factory=dict)
    """Parameters of the manifold besides its radius, e.g. of oblique:
    '+optim.hidden.manifold_options={axis: columns}'."""
    momentum: float = 0.95
    """Fraction of the average kept."""
    nesterov: bool = False
    radius: float = 1.0
    second_moment: float = 0.0
    """NorMuon: fraction kept of the mean square of each row of the direction; 0 does nothing."""
    even_rows: bool = False
    """Give the rows of the direction one length: NorMuon without its state."""
    finishes: dict[str, Any] = field(default_factory=dict)
    """What is done to a direction, in this order, before the two above: names and options of
    optim/finishes: '+optim.hidden.finishes={row_cap: {most: 2.0}, cautious_decay: {}}'. A null one
    is left out."""
    idle: Idle = Idle.skip
    spectral_scale: str = "rms"
    """Factor on the polar factor: rms sqrt(d_out/d_in), muon sqrt(max(1, d_out/d_in)), none."""
    per_head: bool = False
    """Step each attention head's block of q, k, v and the output projection as a matrix of its own,
    at the scale of the whole matrix; parameters without heads are stepped whole."""
    init: Init = Init.model
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW and adam_rows."""
    eps: float = 1e-8
    """AdamW only."""
    baseline: str = ""
    """rule=baseline: a name in optim/baselines.py."""
    options: dict[str, Any] = field(default_factory=dict)
    """rule=baseline: keyword arguments of that optimizer."""


@dataclass
class OverrideConfig(RuleConfig):
    """A rule for the parameters whose names match a glob, tried before the roles."""

    pattern: str = MISSING
    """Globs over names, with | between them: "*.[qk].weight|*.query.weight"."""
    optional: bool = False
    """Whether the pattern may match nothing, for configs that serve several models. Such a route is
    tried after the others, and takes only parameters with heads if it steps those one by one."""


@dataclass
class PolarConfig:
    """How polar factors are computed; see optim/polar."""

    coefficients: str = "polar_express"
    steps: int = 6
    dtype: str = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. Or fp32, bf16, bf16x3 (nearly fp32, on bf16 units)."""
    accuracy: float = 0.0
    """Above 0: the fewest steps that bring singular values within this of 1; steps is not read."""
    lower: float = 1e-3
    """With accuracy: smallest singular value to bring there, as a share of the Frobenius norm."""


@dataclass
class SolverConfig:
    """Manifold Muon's solver; see optim/solvers/stiefel_spectral.py."""

    method: str = "lgm"
    """oneshot (cheapest), lgm, exact (fp64, for tests), published (dual ascent, to compare)."""
    refine: int = 0
    """lgm: refinements of the dual before the completion."""
    form: str = "auto"
    """lgm: gram (n x n products), rect (polar factors of long matrices, bf16 allowed), or auto:
    rect where polar factors are in bf16."""
    products: str = "auto"
    """Of products beside polar factors: fp32, bf16x3, or auto: bf16x3 where polar factors are in
    bf16 on a GPU, except in the Gram form; fp32 elsewhere."""


@dataclass
class RunSize:
    """Size of a run."""

    tokens: int = 0
    batch_tokens: int = 0


@dataclass
class OptimConfig:
    """A rule for each role."""

    name: str = MISSING
    lr: float = MISSING
    """One number for a sweep to move: the roles' rates follow it by interpolation."""
    lr_at: RunSize = field(default_factory=RunSize)
    """The run that optim.lr is the best rate of. Given, optim.lr is carried from there to this
    run's tokens and batch (configs/rate.py); zeros take it as it is."""
    hidden: RuleConfig = field(default_factory=RuleConfig)
    embedding: RuleConfig = field(default_factory=RuleConfig)
    head: RuleConfig = field(default_factory=RuleConfig)
    tied: RuleConfig = field(default_factory=RuleConfig)
    """One weight that is both embedding and head."""
    rest: RuleConfig = field(default_factory=RuleConfig)
    """Gains, biases and scalars."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Route name -> OverrideConfig: '+optim.overrides.q={pattern: "*.q.weight", lr: 0.01}'. A null
    one is left out."""
    budget: Budget = Budget.flat
    """modular: step sizes of hidden matrices by the masses and sensitivities of the modular norm,
    with the rates as their geometric mean (docs/theory.md)."""
    polar: PolarConfig = field(default_factory=PolarConfig)
    solver: SolverConfig = field(default_factory=SolverConfig)
    record_pairs: list[int] = field(default_factory=list)
    """Steps at which the hidden weights and what their directions are taken of are saved, in
    pairs.pt of the run folder, for benches/solver.py."""
    momentum_dtype: MomentumDtype = MomentumDtype.fp32
    """What momenta rest in between steps: 4 or 2 bytes a parameter. Averages are fp32, and rounded
    to bf16 by chance (optim/rounding.py)."""
    compile: bool = False
    """Let torch.compile make the code that finds directions, once for each rule and shape."""
    nonfinite: Nonfinite = Nonfinite["raise"]
    max_norm: float = 1.0
    """Clip the gradient of AdamW and baseline groups at this norm; 0 never clips. Others are scale
    free."""


def recipes() -> list[str]:
    """Names of the recipes: the files of configs/optim."""
    return sorted(file.stem for file in ROOT.glob("*.yaml"))


def read(
    name: str, lr: float | None = None, settings: Mapping[str, Any] | None = None
) -> OptimConfig:
    """Read a recipe as Hydra would compose it from `optim=NAME`.

    lr: in place of the recipe's own.
    settings: values by dotted key of `optim`, e.g. {"hidden.weight_decay": 0.0}.

    Raises:
        UsageError: an unknown recipe or key, or a value of the wrong kind.
    """
    try:
        from omegaconf import OmegaConf
    except ModuleNotFoundError:
        raise UsageError(
            f"recipe '{name}' is a yaml file, which needs omegaconf: pip install 'geon[train]'; or "
            "make rules and a HybridOptimizer yourself"
        ) from None

    if name not in recipes():
        raise UsageError(
            f"recipe '{name}' is not one of {', '.join(recipes())}.{nearest(name, recipes())}"
        )
    changes = {**(settings or {}), **({} if lr is None else {"lr": lr})}
    known = keys(OptimConfig)
    for key in changes:
        if key not in known and key.split(".")[0] != "overrides" and not _is_free(key):
            raise UsageError(f"settings: unknown key '{key}' of optim.{nearest(key, known)}")
    content = OmegaConf.create({"optim": OmegaConf.load(ROOT / f"{name}.yaml")})
    for key, value in changes.items():
        OmegaConf.update(content, f"optim.{key}", value)
    resolved: Any = OmegaConf.to_container(content, resolve=True)
    found = with_overrides(fill(OptimConfig, resolved["optim"], prefix="optim."))
    if found.lr_at != RunSize():
        raise UsageError(
            f"settings: optim.lr_at {found.lr_at.tokens}, {found.lr_at.batch_tokens}: the size of "
            "a run is known to train.py only; give lr=carried_rate(...) of geon.configs.rate"
        )
    return found


def _is_free(key: str) -> bool:
    """Whether a key lies in a mapping of a rule, whose own keys are read where it is made."""
    return any(f".{word}." in key for word in ("options", "manifold_options", "finishes"))


def with_overrides(config: OptimConfig) -> OptimConfig:
    """Fill the overrides of a config by their schema; null ones are left out.

    Raises:
        UsageError: names the key.
    """
    config.overrides = fill_entries(OverrideConfig, config.overrides, "optim.overrides")
    return config


def fill_entries(schema: type[T], entries: Any, place: str) -> dict[str, T]:
    """Fill each entry of a dict field by its schema; null ones are left out.

    Raises:
        UsageError: names the key.
    """
    check_mapping(place, entries)
    return {
        str(name): fill(schema, entry, prefix=f"{place}.{name}.")
        for name, entry in entries.items()
        if entry is not None
    }


def check_mapping(key: str, content: Any) -> None:
    """Refuse what is no mapping where keys are expected.

    Raises:
        UsageError: names the key.
    """
    if not isinstance(content, Mapping):
        raise UsageError(f"{key or 'config'} must be a mapping, got {shown(repr(content))}")


def _check_nodes(schema: Any, content: Any, prefix: str) -> None:
    """Hold the inner nodes against the schema: omegaconf names no key where one is a text."""
    check_mapping(prefix.rstrip("."), content)
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind) and name in content:
            _check_nodes(kind, content[name], f"{prefix}{name}.")


def keys(schema: Any, prefix: str = "") -> list[str]:
    """Every dotted key of a schema, inner nodes included."""
    found = []
    hints = get_type_hints(schema)
    for f in fields(schema):
        name, kind = f"{prefix}{f.name}", hints[f.name]
        found.append(name)
        if is_dataclass(kind):
            found += keys(kind, f"{name}.")
    return found


def fill(schema: type[T], content: Any, prefix: str = "") -> T:
    """Fill a schema with plain content and resolve it, naming the full key of what is wrong."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _check_nodes(schema, content, prefix)
    try:
        filled: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), content))
    except RecursionError:
        raise UsageError("config: keys that refer to each other (${...}) have no value") from None
    except OmegaConfBaseException as error:
        reason = shown(str(error).splitlines()[0], 400)
        key = f"{prefix}{error.full_key}" if error.full_key else prefix.rstrip(".")
        own = [prefix + k for k in keys(schema)]
        hint = "" if key in own else nearest(key, own)
        raise UsageError(f"config: {reason} (key: {key}).{hint}") from None
    return filled
