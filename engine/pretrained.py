"""First weights of a run from a folder of transformers (model.init_from)."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geon.engine.parallel import Parallel
from geon.errors import UsageError
from geon.models import LanguageModel, hf
from geon.optim import ParamInfo, Role

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Pretrained:
    """Weights of a folder, by our names; one is read at a time.

    They make the function that the folder is of: gains are 1, and what the model multiplies by
    (activation_scale, muP's factor of the logits) is divided out.
    """

    def __init__(self, folder: str, model: LanguageModel) -> None:
        """Check config, names and shapes. model: on any device.

        Raises:
            UsageError: no such folder, no transformers, another model, a weight that is missing or
                of another shape.
        """
        self.folder, self._home = folder, Path(folder).expanduser()
        self._model, self._shape = model, model.shape
        try:
            self._check_config()
            self._names = self._find()
            for info in model.infos:
                found = self._read(info, self._described)
                if tuple(found.shape) != tuple(info.shape):
                    raise UsageError(
                        f"its weight for '{info.name}' is {tuple(found.shape)}, expected "
                        f"{tuple(info.shape)}: it is of another model"
                    )
        except UsageError as error:
            raise UsageError(f"model.init_from '{folder}': {error}") from None

    def weight(self, info: ParamInfo) -> Tensor:
        """The whole weight in fp32, on the CPU."""
        return self._read(info, self._loaded).float().contiguous()

    def _check_config(self) -> None:
        if not self._home.is_dir():
            raise UsageError(f"no such folder (looked in {Path.cwd()})")
        if not (self._home / "config.json").is_file():
            raise UsageError("the folder holds no config.json")
        arch, found = self._model.arch, hf.map_of(self._model)
        found.config(self._shape)  # refuses what transformers has not
        wanted = found.kind(self._shape)[1]
        try:
            import safetensors  # noqa: F401
            from transformers import AutoConfig
        except ImportError:
            raise UsageError("reading it needs transformers: pip install 'geon[hf]'") from None
        try:
            kind = json.loads((self._home / "config.json").read_text("utf-8")).get("model_type")
            if kind != wanted:
                raise UsageError(f"it is of type {kind}, and model={arch} takes {wanted}")
            given: Any = AutoConfig.from_pretrained(self._home, local_files_only=True)
        except UsageError:
            raise
        except Exception as error:  # whatever transformers makes of another file
            reason = " ".join(str(error).split())[:200]
            raise UsageError(f"its config.json cannot be read: {reason}") from None
        hf.check_config(self._model, given)

    def _find(self) -> dict[str, Path]:
        """File of each weight by its name."""
        from safetensors import SafetensorError, safe_open

        files = [self._home / _WEIGHTS]
        if not files[0].is_file():
            try:
                index = json.loads((self._home / _INDEX).read_text("utf-8"))["weight_map"]
            except FileNotFoundError:
                raise UsageError(f"the folder holds no {_WEIGHTS}") from None
            except (OSError, ValueError, LookupError) as error:
                raise UsageError(f"its {_INDEX} cannot be read: {error}") from None
            files = [self._home / name for name in sorted(set(index.values()))]
        found = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    found |= dict.fromkeys(opened.keys(), file)
            except (OSError, SafetensorError) as error:
                raise UsageError(f"its {file.name} cannot be read: {error}") from None
        return found

    def _read(self, info: ParamInfo, get: Any) -> Tensor:
        """A weight of ours, of what `get` gives."""
        shape, name = self._shape, info.name
        if info.role is Role.GAIN and name.endswith((".rows", ".cols")):
            return torch.ones(info.shape)
        weight = hf.imported(self._model, name, get)
        if name.endswith("down.weight"):
            weight = weight / getattr(shape, "activation_scale", 1.0)
        last = "head." if hasattr(self._model, "head") else "norm."
        return weight / shape.shrink if name.startswith(last) else weight

    def _named(self, name: str) -> str:
        """A name as the files have it: the first GPT-2s were saved without their prefix."""
        short = name.removeprefix("transformer.")
        found = name if name in self._names else short
        if found not in self._names:
            raise UsageError(f"its files hold no '{name}'")
        return found

    def _described(self, name: str) -> Tensor:
        """An empty tensor on the meta device."""
        from safetensors import safe_open

        name = self._named(name)
        with safe_open(self._names[name], "pt") as opened:
            return torch.empty(opened.get_slice(name).get_shape(), device="meta")

    def _loaded(self, name: str) -> Tensor:
        from safetensors import safe_open

        name = self._named(name)
        with safe_open(self._names[name], "pt") as opened:
            return opened.get_tensor(name)


def open_alike(folder: str, model: LanguageModel, parallel: Parallel) -> Pretrained:
    """Open a folder on every rank; every rank must call.

    Raises:
        UsageError: on every rank, what one of them does not find; names the rank.
    """
    error, found = None, None
    try:
        found = Pretrained(folder, model)
    except UsageError as caught:
        error = str(caught)
    for rank, told in enumerate(parallel.gather(error)):
        if told:
            raise UsageError(told if parallel.env.world == 1 else f"rank {rank}: {told}")
    assert found is not None
    return found
