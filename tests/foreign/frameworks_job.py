"""Started by torchrun: accelerate with FSDP2 on two ranks; prints one JSON line of what held."""

import gc
import json
import sys
import traceback
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from geon.launch.leave import leave
from tests.foreign.test_frameworks import KINDS, STEPS, STOP, batches, llama, optimizer_of, snap


def accelerator_on_cpu():
    """Accelerate has FSDP on accelerators only: here it is told that it may, once it is made."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    made = Accelerator(cpu=True, fsdp_plugin=plugin)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert made.is_fsdp2
    return made


def run(kind, seed, folder, resumed=False):
    accelerator = accelerator_on_cpu()
    model = llama(seed)
    optimizer = optimizer_of(kind, model)  # before the model is cut, as accelerate wants it
    whole = [weakref.ref(param) for param in model.parameters()]
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(param, DTensor) for param in model.parameters())
    gc.collect()
    kept = sum(one() is not None for one in whole)
    if resumed:
        accelerator.load_state(folder)
    for step, tokens in enumerate(batches(STEPS)):
        if resumed and step < STOP:
            continue
        mine = tokens.chunk(accelerator.num_processes)[accelerator.process_index]
        accelerator.backward(model(input_ids=mine, labels=mine).loss)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == STOP and not resumed:
            accelerator.save_state(folder)
    return model, optimizer, kept


def alone(kind, seed):
    model = llama(seed)
    optimizer = optimizer_of(kind, model)
    for tokens in batches(STEPS):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def own(tensor):
    """This rank's piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held(kind, folder):
    model, optimizer, kept = run(kind, 0, folder)
    one, two = snap(model, optimizer), snap(*run(kind, 1, folder, resumed=True)[:2])
    assert one.keys() == two.keys()
    differ = [key for key in one if not torch.equal(own(one[key]), own(two[key]))]
    far = 0.0
    for param, twin in zip(model.parameters(), alone(kind, 0).parameters(), strict=True):
        far = max(far, ((param.full_tensor() - twin).norm() / twin.norm()).item())
    return {"differ": differ, "far": far, "kept": kept}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for kind in KINDS:
        try:
            found[kind] = held(kind, Path(sys.argv[1]) / kind)
        except Exception:
            found[kind] = {"differ": traceback.format_exc(), "far": None, "kept": None}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        print(json.dumps(everyone))
        sys.stdout.flush()
    leave(0)
