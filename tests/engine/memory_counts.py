"""Counts of what is really held: storages that autograd saves, and the peak of live ones."""

import weakref
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def saved_bytes(model):
    """Sizes, by storage, of what is saved for the backward pass; parameters are left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}
    alive = []  # so that no address is used twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class Live(TorchDispatchMode):
    """Bytes of all storages that live, and their peak: what a GPU's allocator would count."""

    def __init__(self, *tensors):
        super().__init__()
        self.storages, self.peak = {}, 0
        self.see(tensors)

    def see(self, tensors):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            key = storage._cdata
            if key not in self.storages:
                self.storages[key] = weakref.ref(storage)
                weakref.finalize(storage, self.storages.pop, key, None)
        self.peak = max(self.peak, self.now)

    @property
    def now(self):
        """Bytes; FSDP2 empties and fills storages that live on."""
        living = (one() for one in list(self.storages.values()))
        return sum(one.nbytes() for one in living if one is not None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again, as what it does on this rank
        found = function(*args, **(kwargs or {}))
        self.see((args, found))
        return found


def step_peaks(trainer):
    """Peaks of the second step: before the optimizer's part of it, and in that."""
    run, peaks = trainer.run, []
    trainer.train_step()
    live = Live(*run.model.parameters(), *run.optimizer.state_tensors().values())
    update = run.parallel.update

    def step(optimizer):
        peaks.append(live.peak)
        live.peak = live.now
        update(optimizer)

    run.parallel.update = step
    with live:
        trainer.train_step()
    return [*peaks, live.peak]
