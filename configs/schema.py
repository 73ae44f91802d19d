"""The shape of every config: one dataclass a group. Yaml files fill them; nothing else exists."""

import dataclasses
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from geon.configs.choices import (
    Arch,
    Format,
    Layouts,
    Mode,
    Norms,
    Objective,
    Outcome,
    Policy,
    Precision,
    Residual,
    Shape,
    Source,
    Task,
    TransportChoice,
    Wire,
)
from geon.configs.choices import RuleKind as RuleKind
from geon.configs.jobs import ArmConfig as ArmConfig
from geon.configs.jobs import ClusterConfig, LoggerConfig, SweepConfig
from geon.configs.recipes import OptimConfig
from geon.configs.recipes import RuleConfig as RuleConfig


@dataclass
class ModelConfig:
    """Sizes and options; see models/shapes.py."""

    arch: Arch = MISSING
    n_layer: int = MISSING
    n_head: int = MISSING
    d_model: int = MISSING
    context: int = MISSING
    """Longest sequence, tokens."""
    vocab_size: int = MISSING
    """Token ids; follows data.vocab_size unless set (a larger one pads). A run's config.yaml holds
    the number where that is 0."""
    mlp_ratio: int = 4
    softcap: float = 0.0
    """Bound c of the logits z: c tanh(z / c); gpt_track3: c z / sqrt(z^2 + c^2). 0 leaves them."""
    fused_qkv: bool = False
    zero_init_proj: bool = False
    rope_base: float = 10000.0
    tied: bool = False
    """The embedding is the head as well; in gpt it then enters the residual stream unnormalised."""
    activation_scale: float = 1.0
    """gpt: factor on the squared ReLU; 2 keeps variances (Scion)."""
    gains: bool = False
    """gpt: each hidden matrix is diag(rows) W diag(cols), rows and cols learnt by optim.rest."""
    residual: Residual = Residual.plain
    """gpt: plain adds a branch to the stream; scaled takes (1 - s) stream + s branch, s = 1 / (2
    n_layer), whose sensitivity does not grow with depth."""
    norm: Norms = Norms.rms
    """gpt: none leaves out every RMSNorm, so that a certificate holds without conditions."""
    mup: bool = False
    """Maximal update parametrisation: draws, AdamW's rates and logits scale with the width."""
    base_width: int = 64
    """Width at which mup changes nothing: where the rate was tuned."""
    head_dim: int = 0
    """When set, n_head = d_model / head_dim, so that a sweep of widths keeps it."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of one architecture alone: its file in configs/model lists them, models/ explains them."""
    init_from: str = ""
    """Of models that transformers has: folder of weights that a run begins with; empty draws."""


@dataclass
class DataConfig:
    """Tokens and batches."""

    source: Source = MISSING
    vocab_size: int = 256
    """Token ids; 0 takes as many as the tokenizer has, for every source but data=synthetic."""
    batch_tokens: int = MISSING
    """Tokens of a global batch, over all ranks; accumulation is derived."""
    micro_batch: int = 0
    """Sequences in one forward pass of one rank; 0 takes the most that divide a rank's share and
    are predicted to fit its memory (on a GPU 65,536 tokens at most)."""
    val_percent: float = 10.0
    """Share of the text (of the files, by name) kept for validation."""
    val_tokens: int = 0
    """Validation tokens evaluated; 0 takes all."""
    shuffle: bool = True
    path: str = ""
    """data=text: text, .jsonl or .parquet, also packed, a file or folder; images: CIFAR-10's."""
    bpe_vocab: int = 0
    """data=text: train a BPE of this size on the text; 0 reads bytes."""
    skip_undecodable: bool = False
    """data=text: leave out, and count, what is not UTF-8 (a file, a piece of 1 MiB of a larger one,
    a line of JSON) rather than refuse it."""
    train: str = ""
    """data=bins: glob of training shards."""
    val: str = ""
    """data=bins: glob of validation shards."""
    dir: str = ""
    """data=bins: a folder with a meta.json, which names its shards, in place of the two globs."""
    dtype: str = ""
    """data=bins: uint16 or uint32, for files without a header or a meta.json beside them."""
    tokens: int = 0
    """data=synthetic: length. data=images, without data.path: images that are drawn."""
    tokenizer: str = ""
    """data=text, stream: bytes, gpt2, path of a tokenizer.json or its folder, or a name on the
    hub; empty reads bytes."""
    field: str = "text"
    """data=text, stream: field of JSON lines, or column, that holds the text."""
    dataset: str = ""
    """data=stream: a Hugging Face dataset by name, or a local file or folder of .jsonl, .json,
    .parquet or .txt."""
    subset: str = ""
    """data=stream: the dataset's configuration; empty takes its only one."""
    revision: str = ""
    """data=stream: commit of the dataset on the hub; empty takes the newest."""
    split: str = "train"
    """data=stream: what is trained on."""
    val_split: str = ""
    """data=stream: what is validated on; empty holds out data.val_percent of the documents, by the
    hash of their text."""
    streams: int = 8
    """data=stream: disjoint parts that the dataset is read in. Ranks divide it, and it divides the
    windows of a batch; so what is read does not depend on the number of ranks."""
    buffer: int = 1000
    """data=stream: documents of a part that are shuffled together."""
    workers: int = 1
    """data=stream: processes of each rank that read and tokenize ahead; 0 has none."""
    mix: dict[str, Any] = dataclasses.field(default_factory=dict)
    """data=mix: name -> MixConfig: 'data.mix={code: {weight: 0.7, source: stdlib}, prose: {weight:
    0.3, source: text, path: FOLDER}}'. A null source is left out."""

    def parts(self) -> dict[str, "DataConfig"]:
        """Sources of a mixture by name, each as if it were alone."""
        alone: dict[str, Any] = {
            f.name: f.default for f in fields(DataConfig) if f.name in PLACE_WORDS
        }
        base = replace(self, mix={}, **alone)
        found = {}
        for name, entry in self.mix.items():
            own = {key: value for key, value in vars(entry).items() if value is not None}
            own.pop("weight")
            found[name] = replace(base, **own)
        return found


PLACE_WORDS = ("path", "train", "val", "dir", "dtype", "tokens", "bpe_vocab")
"""Keys of data that a source of a mixture does not take over from `data` where it lacks them."""


@dataclass
class MixConfig:
    """A source of data=mix. Keys that it lacks are those of `data`, but for where its text lies."""

    weight: float = MISSING
    """Its share of the windows, beside those of the others."""
    source: Source = MISSING
    """stdlib, text, bins or synthetic."""
    path: str | None = None
    field: str | None = None
    train: str | None = None
    val: str | None = None
    dir: str | None = None
    dtype: str | None = None
    tokens: int | None = None
    val_percent: float | None = None


@dataclass
class ParallelConfig:
    """How the model lies over the ranks, and what is traded for memory."""

    layout: Layouts = MISSING
    replicas: int = 1
    """hsdp: number of replicas; each is sharded over world / (replicas x tensor) ranks."""
    tensor: int = 1
    """fsdp, hsdp: ranks of tensor parallelism, innermost; parallel=tp takes all ranks for it."""
    long_side: bool = True
    """fsdp, hsdp: cut wide hidden matrices by columns where those divide (FSDP2's Shard(1))."""
    zero: int = 1
    """deepspeed: ZeRO stage."""
    precision: Precision = Precision.auto
    compile: bool | None = None
    """torch.compile forward and backward, the loss included; null does on a GPU."""
    activation_checkpointing: bool = False
    loss_chunks: int = 0
    """Pieces that a micro-batch's logits are made in: more need less memory; 0 takes 1,
    and more where one sequence would not fit otherwise."""
    share_gpu: bool = False
    """Let several ranks of a node share a GPU: to test, not to go faster. Needs NCCL 2.30."""
    timeout_seconds: float = 600.0
    """A collective that takes longer ends the run with an error."""


@dataclass
class ScheduleConfig:
    """Length of the run and the learning rate along it."""

    shape: Shape = MISSING
    steps: int = MISSING
    tokens: int = 0
    """When set, steps follow: tokens / data.batch_tokens, so that a sweep of batches keeps it."""
    warmup: float = 0.0
    """Share of the run with a linear warm-up."""
    decay: float = 1.0
    """linear: share of the run that decays, at its end."""
    floor: float = 0.0
    """Fraction of the peak at the end."""
    budget_seconds: float = 0.0
    """When set, a run too slow for its steps anneals by the clock and ends at this time, to which
    evaluations do not count."""


@dataclass
class CheckpointConfig:
    """What is kept, and where a run starts from."""

    every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep: int = 2
    """Newest committed checkpoints kept."""
    resume: str = "auto"
    """auto: the run folder's latest, if any. never: start anew (an old folder is moved aside).
    Otherwise the path of a run folder or checkpoint."""
    background: bool = False
    """Copy weights and state to the CPU at the step, and write them by a thread beside the training
    (asynchronously): takes as much CPU memory as a checkpoint has bytes on a rank."""
    allow_change: list[str] = field(default_factory=list)
    """Keys, groups or globs (optim.lr, optim, "*.precision") that may differ from those of the
    checkpoint although weights depend on them (configs/changes.py)."""
    project: bool = False
    """Bring the weights of the checkpoint to the manifolds of other rules (with allow_change)."""


@dataclass
class HealthConfig:
    """What bad numbers do to a run: a loss, gradient, weight or state that is not finite, a spike.

    All ranks find them alike, at the step that makes them; bad weights before anything is saved.
    """

    policy: Policy = Policy.stop
    max_skips: int = 3
    """skip: most steps left out in a row; one more ends the run."""
    max_rewinds: int = 3
    """rewind: how often; once more ends the run."""
    spike: float = 20.0
    """A gradient whose norm is above so many times its parameter's running norm is cut down to
    that norm, so that one spike does not turn a momentum for hundreds of steps; 0 never."""
    updates: bool = True
    """Look at weights and optimizer state after every step too: one reading of them all."""


@dataclass
class EvalConfig:
    """Validation and samples."""

    every: int = 0
    """Steps between evaluations; 0 only at the end."""
    objective: Outcome = Outcome.last
    """Which validation loss is the run's objective (report.json), which a sweeper minimises: last,
    or the best of all evaluations; nats a byte where known, else a token."""
    batch: int = 64
    """Sequences in one forward pass."""
    sample_tokens: int = 0
    """Length of the sample printed at the end; 0 prints none."""
    sample_prompt: str = "def "
    sample_temperature: float = 0.8


@dataclass
class ShardConfig:
    """The exchange of sharded matrices; see optim/shard and docs/distributed.md."""

    transport: TransportChoice = TransportChoice.auto
    objective: Objective = Objective.time
    reproducible: bool = False
    """Owners only, every matrix computed alone, fp32 wire: bit-identical to one process."""
    max_buffer_mb: float = 64.0
    """Scratch of one bucket on a rank; a bucket may always hold one matrix a rank."""
    wire: Wire = Wire.auto
    machine: str = "auto"
    """Whose speeds the plan reckons with (MACHINES in optim/shard/machine.py): cpu, cuda,
    cuda_infiniband, cuda_ethernet; auto is the device of the run. FILE.json: what
    `python -m geon.scripts.doctor --measure FILE.json` measured."""
    tflops: float = 0.0
    """fp32 products of any size, of one rank; 0 here and below takes the machine's figure."""
    half_tflops: float = 0.0
    """bf16 products of any size."""
    gbytes: float = 0.0
    """GB/s that a rank sends."""
    latency_us: float = 0.0
    """Of one collective."""


@dataclass
class PlanConfig:
    """What mode=plan assumes and prints."""

    format: Format = Format.table
    world_size: int = 0
    """Ranks to plan for; 0 takes WORLD_SIZE, or 1."""
    memory_gb: float = 0.0
    """GB of a rank's device, of which 90% are planned with; 0 takes those of the device here, or 80
    for a GPU that is not here."""


@dataclass
class Config:
    """All there is to a run."""

    name: str = "run"
    """The run folder is <output>/<name>."""
    output: str = "runs"
    seed: int = 0
    task: Task = Task.text
    """A group, configs/task: text predicts the next token, image the class of an image."""
    mode: Mode = Mode.train
    device: str = "auto"
    """auto: CUDA when present, else cpu."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)


@cache
def register() -> None:
    """Make the schema known to Hydra, under the name that configs/train.yaml starts from."""
    ConfigStore.instance().store(name="schema", node=Config)
