"""The words that a config key may take, where they are few."""

from enum import Enum
from pathlib import Path


class Mode(Enum):
    """What `train.py` does."""

    train = "train"
    plan = "plan"
    """Say what would be sent, computed and held, and stop."""
    certify = "certify"
    """Print bounds of activations and sensitivities of the weights that a run would start or go on
    from (checkpoint.resume), and stop."""


class Format(Enum):
    """How `mode=plan` prints."""

    table = "table"
    json = "json"


class Task(Enum):
    """What a model learns."""

    text = "text"
    """The next token."""
    image = "image"
    """The class of an image."""


def _architectures() -> list[str]:
    """Architectures that a file of configs/model is of."""
    found = set()
    for file in (Path(__file__).resolve().parent / "model").glob("*.yaml"):
        lines = file.read_text("utf-8").splitlines()
        found |= {line.split()[1] for line in lines if line.startswith("arch: ")}
    return sorted(found)


Arch = Enum("Arch", {name: name for name in _architectures()})  # type: ignore[misc]
"""Architecture (models/): what the files of configs/model name."""


class Residual(Enum):
    """How a branch joins the stream of `gpt`."""

    plain = "plain"
    """Added."""
    scaled = "scaled"
    """With a share of 1 / (2 n_layer), and the rest of the stream: 2405.14813's residual."""


class Norms(Enum):
    """Norms of activations in `gpt`."""

    rms = "rms"
    none = "none"
    """None at all, of queries and keys either; their products are over head_dim, not its root."""


class Budget(Enum):
    """How step sizes are shared out over the hidden matrices (optim/modular)."""

    flat = "flat"
    """As the rates say."""
    modular = "modular"
    """By the masses and sensitivities of the modular norm, with the rate as geometric mean."""


class Source(Enum):
    """Where tokens come from (data/)."""

    stdlib = "stdlib"
    text = "text"
    bins = "bins"
    synthetic = "synthetic"
    stream = "stream"
    mix = "mix"
    images = "images"


class Layouts(Enum):
    """How the model lies over the ranks (engine/parallel.py)."""

    single = "single"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"
    tp = "tp"
    deepspeed = "deepspeed"


class Precision(Enum):
    """Arithmetic of the model; weights and optimizer are always fp32."""

    auto = "auto"
    """bf16 on a GPU, fp32 on a CPU."""
    native = "native"
    """bf16 wherever the processor has instructions for it, a CPU too; fp32 elsewhere. Polar factors
    with optim.polar.dtype=auto then follow. Two machines may differ."""
    fp32 = "fp32"
    bf16 = "bf16"


class Shape(Enum):
    """Shape of the learning rate after warmup."""

    linear = "linear"
    """Constant, then linear to the floor over the last `decay` of the run."""
    cosine = "cosine"
    constant = "constant"


class Init(Enum):
    """Where a weight starts."""

    model = "model"
    """As the model draws it, brought to the manifold if there is one."""
    boundary = "boundary"
    """On the sphere of the rule's norm, at its radius; zero where the model says zero."""


class RuleKind(Enum):
    """What steps a route's parameters."""

    steepest = "steepest"
    adamw = "adamw"
    adam_rows = "adam_rows"
    """Adam with one second moment a row (optim/row_adam.py): embeddings and heads."""
    baseline = "baseline"
    """Another package's optimizer (optim/baselines.py)."""


class Idle(Enum):
    """What a steepest rule does to a parameter that has no gradient in a step."""

    skip = "skip"
    """Leave weight and momentum alone, as torch.optim does."""
    coast = "coast"
    """Take the gradient as zero: the momentum decays and moves the weight on."""


class MomentumDtype(Enum):
    """What the momenta of steepest rules rest in."""

    fp32 = "fp32"
    bf16 = "bf16"


class TransportChoice(Enum):
    """How sharded matrices become whole (optim/shard/transports/)."""

    auto = "auto"
    """By predicted cost, kind by kind."""
    owner = "owner"
    gram = "gram"


class Objective(Enum):
    """What shard.transport=auto minimises."""

    time = "time"
    bytes = "bytes"


class Outcome(Enum):
    """Which validation loss of a run is its objective."""

    last = "last"
    best = "best"


class Wire(Enum):
    """Words of updates and directions that travel; weights and sums are always fp32."""

    auto = "auto"
    """bf16 on a GPU, fp32 on a CPU and for shard.reproducible=true."""
    fp32 = "fp32"
    bf16 = "bf16"


Nonfinite = Enum("Nonfinite", {"raise": "raise", "skip": "skip", "ignore": "ignore"})
"""What a gradient with nan or infinity does (optim/hybrid.py): raise ends the run on every rank
before anything is stepped, skip leaves out the step and counts it, ignore does not look, which
spares a wait for the device a step."""


class Policy(Enum):
    """What a number that is not finite does to a run (engine/health.py)."""

    stop = "stop"
    """The run ends on every rank, with exit status 1."""
    skip = "skip"
    """A step whose loss or gradient is bad is left out; bad weights end the run."""
    rewind = "rewind"
    """The run goes back to its newest checkpoint, and leaves the step out when it comes again."""
