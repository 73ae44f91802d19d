"""Counts of what is really held: storages that autograd saves, and the peak of live ones."""

import weakref
from contextlib import contextmanager

import torch
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
        self.sizes, self.now, self.peak = {}, 0, 0
        self.see(tensors)

    def see(self, tensors):
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, key)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.see(found)
        return found
