"""Joins the process group, sums, says so, and fails: torchrun starts it again."""

import os

import torch
import torch.distributed as dist

from geon.engine.rendezvous import join
from geon.launch.signals import die_with_parent

die_with_parent()
attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
join("gloo", 20)
total = torch.ones(1)
dist.all_reduce(total)
dist.new_group(backend="gloo")
print(f"\nattempt {attempt} rank {rank} sum {total.item():.0f}\n", end="", flush=True)
# torchrun ends the other rank as soon as one has failed: both have said their line before.
dist.barrier()
os._exit(1)
