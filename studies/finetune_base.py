"""What the study of fine-tuning starts from: two texts, a small Llama, and its training."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from geon.data import Batches, Split, stdlib_corpus
from geon.data.corpus import SEPARATOR, join_split
from geon.engine.callbacks import write_json

BASE_LR, WARM = 3e-3, 0.05
"""Peak rate of the pretraining, and the share of a training over which its rate rises."""
CODE_PERCENT, TOPICS_PERCENT = 2.0, 15.0
"""Held out of each text, by files of code and by topics of documentation."""


@dataclass(frozen=True)
class Size:
    """Of the model, and of the batches in tokens and the steps of both trainings."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    batch: int = 1024
    steps: int = 200
    base_batch: int = 512
    base_steps: int = 2000


def texts() -> dict[str, Split]:
    """Code of the standard library, documentation in pydoc_data.topics, and what is held out.

    The file with the documentation is taken out of the code, and what training topics hold too out
    of those held out, a paragraph at a time: topics quote each other.
    """
    from pydoc_data import topics

    code = stdlib_corpus(CODE_PERCENT)
    leak = SEPARATOR + Path(topics.__file__).read_bytes()
    parts = [one.segments[0][:].tobytes().replace(leak, b"") for one in (code.train, code.val)]
    train, val = join_split({k: v.encode() for k, v in topics.topics.items()}, TOPICS_PERCENT)
    known = {part.strip() for part in train.replace(SEPARATOR, b"\n\n").split(b"\n\n")}
    new = [
        b"\n\n".join(part for part in topic.split(b"\n\n") if part.strip() not in known)
        for topic in val.split(SEPARATOR)
    ]
    parts += [train, b"".join(SEPARATOR + topic for topic in new if topic.strip())]
    names = ("code", "code held out", "topics", "topics held out")
    return {
        name: Split(name, [np.frombuffer(part, np.uint8)])
        for name, part in zip(names, parts, strict=True)
    }


def batches(text: Split, size: Size, tokens: int, seed: int) -> Batches:
    """Order of a text under a seed, in batches of so many tokens."""
    rows = tokens // size.context
    return Batches(text, size.context, rows, 0, 1, rows, seed=seed)


def cross_entropy(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of a model of transformers, nats per token."""
    logits = model(tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def loss(model: nn.Module, text: Split, size: Size) -> float:
    """Mean loss over a whole text, nats per byte."""
    windows = (len(text) - 1) // size.context
    parts = Batches(text, size.context, windows, 0, 1, 16, shuffle=False).step(0)
    return sum(float(cross_entropy(model, *part)) * len(part[0]) for part in parts) / windows


def train(model: nn.Module, optimizer: Any, order: Batches, steps: int) -> None:
    """Train by any torch optimizer: a short warm-up, then down to 0 on a line."""
    warm = max(1, round(WARM * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
    )
    for step in range(steps):
        cross_entropy(model, *order.step(step)[0]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def new_model(size: Size, seed: int) -> nn.Module:
    """A Llama over bytes that was just drawn."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.width,
        intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def pretrain(code: Split, size: Size, seed: int, folder: Path) -> nn.Module:
    """Pretrain a model on code by torch.optim.AdamW, and save it as transformers does."""
    model = new_model(size, seed)
    optimizer = torch.optim.AdamW(model.parameters(), BASE_LR, (0.9, 0.95), weight_decay=0.1)
    train(model, optimizer, batches(code, size, size.base_batch, seed), size.base_steps)
    model.save_pretrained(folder)
    return model


def load(folder: Path) -> nn.Module:
    """The model of a folder, as from_pretrained loads it."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(folder)


def kept(folder: Path, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a folder holds under a name; made and put there if it does not."""
    path, began = folder / f"{name}.json", time.process_time()
    if not path.exists():
        made = make()
        if "loss" in made:
            made["cpu_seconds"] = round(time.process_time() - began, 1)
            print(f"{name:<40} {made['loss']:.4f} {made['cpu_seconds']:8.1f} s", flush=True)
        write_json(path.with_suffix(".part"), made)
        path.with_suffix(".part").replace(path)
    content: dict[str, Any] = json.loads(path.read_text())
    return content
