"""The part of the schema that no weight depends on: what is logged, and how jobs are started."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class LoggerConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    every: int = 10
    """Steps between lines."""
    progress: bool = True
    """Progress bar on a terminal; plain lines elsewhere."""
    spectrum_every: int = 0
    """Steps between records of the hidden weights' singular values; 0 never."""
    geometry_every: int = 0
    """Steps between inspections of directions on manifolds (certified gap, tangency); 0 never."""
    certify_every: int = 0
    """Steps between certificates in the log: bounds of logits and of sensitivity; 0 never."""
    wandb: bool = False
    wandb_project: str = "geon"
    wandb_entity: str = ""
    """Team or user whose project it is; empty takes the key's own."""
    wandb_group: str = ""
    """What runs are shown together under, e.g. the seeds of one setting."""
    wandb_tags: list[str] = field(default_factory=list)
    wandb_mode: str = "offline"
    """offline keeps the run in its folder, for `wandb sync`; online needs a key (WANDB_API_KEY, or
    `wandb login`); disabled does nothing."""
    tensorboard: bool = False


@dataclass
class ClusterConfig:
    """Where `launch/slurm.py` runs a job, and how many ranks `launch/sweep.py` gives one.

    With cluster=slurm a sweep is one array of jobs.
    """

    name: str = MISSING
    nodes: int = 1
    ranks_per_node: int = 1
    cpus_per_rank: int = 8
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    """Features of nodes, e.g. h100."""
    mem: str = ""
    """Memory of a node, e.g. 200G; 0 takes all of it."""
    gres: str = ""
    """What stands in place of gpus-per-node=<ranks_per_node>, e.g. gpu:h100:8."""
    time: str = "01:00:00"
    directives: list[str] = field(default_factory=list)
    """More lines of #SBATCH, without the hyphens: [mail-type=END, exclude=n7]."""
    setup: str = ""
    """Shell lines before the launch, e.g. module loads."""


@dataclass
class ArmConfig:
    """One side of a comparison."""

    overrides: list[str] = field(default_factory=list)
    """What makes it, e.g. [optim=muon]."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Values of its own for keys of the grid."""


@dataclass
class SweepConfig:
    """A grid of jobs for `launch/sweep.py`; each is a torchrun of its own."""

    name: str = "none"
    overrides: list[str] = field(default_factory=list)
    """What all jobs share; what is given beside sweep=... comes after it, and wins."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Config key -> values; the jobs are the product, within each arm where there are arms."""
    arms: dict[str, Any] = field(default_factory=dict)
    """Name -> ArmConfig: "+sweep.arms.lion={overrides: ['optim=lion'], grid: {optim.lr: [0.001]}}".
    A null arm is left out."""
    parallel_jobs: int = 0
    """Jobs at a time; 0 takes as many as GPUs, or as CPU cores, have room for; in an array all."""
